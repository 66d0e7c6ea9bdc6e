"""Checks that a CPU runtime computes each layer of a model correctly.

A library kernel that is wrong for one geometry on one CPU produces wrong words
and no error. So each distinct geometry is computed once on a machine by the
runtime's own code and compared with exact arithmetic. A wrong one is computed
by another algorithm of the same runtime; without a correct algorithm the
runtime is not used.
"""

import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from ..core.encoder_spec import EncoderSpec
from ..core.integer_layer import IntegerLayer
from ..utils.files import code_identity, identity
from ..utils.store import machine_store
from ..utils.typed import one_line, typed
from .algorithms import geometry_of, plain_windows
from .cpu import machine_identity
from .geometry import NATIVE, Geometry
from .trial_layer import (
    Results,
    Trial,
    difference,
    expected_results,
    make_trial,
)

logger = logging.getLogger(__name__)

_WHAT = "layers tried on this CPU"


class UnusableRuntime(ValueError):
    """A runtime computes wrong results on this machine."""


class LayerRunner(Protocol):
    """Computes single layers by a runtime's code, made of its options."""

    name: str  # of the runtime
    # What its results depend on beside the CPU and our code.
    versions: Mapping[str, str]

    def half(self, geometry: Geometry) -> bool:
        """Whether a geometry is computed, or its result given, in bfloat16."""

    def algorithms(self, geometry: Geometry) -> tuple[str, ...]:
        """Algorithms for a geometry, the fastest first."""

    def run(self, geometry: Geometry, trial: Trial) -> Results:
        """Compute the layer of a trial by its ``algorithm``."""


@torch.autocast("cpu", enabled=False)
def exact_algorithm(
    geometry: Geometry, runner: LayerRunner
) -> tuple[str | None, str, bool]:
    """The first algorithm that computes a geometry correctly, if any; what was
    wrong with the first one tried (empty: nothing); and whether any raised."""
    half = runner.half(geometry)
    trial = make_trial(geometry, half)
    expected = expected_results(geometry, trial, half)
    first, raised = "", False
    for algorithm in runner.algorithms(geometry):
        layer = replace(trial.layer, algorithm=algorithm)
        try:
            found = runner.run(geometry, trial._replace(layer=layer))
            reason = difference(found, expected)
            if reason is None:
                return algorithm, first, raised
            reason = f"the result {reason}"
        # A library may raise anything.
        except Exception as error:
            reason, raised = f"it fails: {one_line(error)}", True
        first = first or reason
    return None, first, raised


class _Memory:
    """Results of earlier checks of a runtime, stored on this machine:
    [algorithm, fault of the first one tried] by geometry."""

    def __init__(self, runner: LayerRunner):
        self._key = identity(
            {
                "code": _code_digest(),
                "runtime": runner.name,
                "versions": dict(runner.versions),
                **machine_identity(),
            }
        )
        # One file for each setting of the machine.
        self._name = f"{runner.name}-{self._key[:12]}.json"
        self._store = machine_store("cpu")

    def known(self) -> dict[str, list[str]]:
        found = self._store.read(
            self._name,
            self._key,
            _WHAT,
            lambda raw: typed(raw, dict[str, list[str]], "content"),
        )
        return found or {}

    def add(self, found: Mapping[str, list[str]]) -> None:
        self._store.update(self._name, self._key, found, _WHAT)


@functools.cache
def _code_digest() -> str:
    return code_identity(Path(__file__).parents[1])


def find_algorithms(
    geometries: Mapping[str, Geometry], runner: LayerRunner
) -> dict[str, str]:
    """Algorithm by layer name; :class:`UnusableRuntime` if a layer has no
    correct one.

    Results are stored until the CPU, a library or our code changes.
    """
    layers: dict[Geometry, str] = {}
    for name, geometry in geometries.items():
        layers.setdefault(geometry, name)
    if not layers:
        return {}
    memory = _Memory(runner)
    known, fresh = memory.known(), {}
    for geometry, layer in layers.items():
        key = str(geometry)
        wrong = f"{runner.name} computes {layer} wrongly on this CPU ({key}: "
        if key not in known:
            algorithm, reason, raised = exact_algorithm(geometry, runner)
            if algorithm is None:
                raise UnusableRuntime(
                    f"backend: {wrong}{reason}); write backend: auto"
                )
            known[key] = [algorithm, reason]
            # An error, such as a lack of memory, may pass: try again.
            if not raised:
                fresh[key] = known[key]
        algorithm, reason = known[key]
        if reason:
            _say_once(
                f"{wrong}{reason}); this layer is computed as {algorithm} "
                "instead"
            )
    if fresh:
        memory.add(fresh)
    return {name: known[str(g)][0] for name, g in geometries.items()}


@functools.cache
def _say_once(line: str) -> None:
    logger.warning(line)


def encoder_geometries(spec: EncoderSpec) -> dict[str, Geometry]:
    """Geometry by layer name of an encoder that is executed."""
    rows: list[tuple] = []
    for index, stage in enumerate(spec.convs):
        if not plain_windows(stage.conv):
            continue  # refused by the runtimes, in their own words
        at_once = stage.norm is None or stage.norm.over_time
        place = "front" if index else "first"
        rows.append((stage.conv, place, "gelu" if at_once else ""))
    rows.append((spec.projection, "linear"))
    rows.append((spec.pos_conv, "position"))
    for block in spec.blocks:
        for layer in (block.query, block.key, block.value):
            rows.append((layer, "linear", "shared"))
        rows.append((block.out, "linear", "sum"))
        rows.append((block.up, "linear", "gelu"))
        rows.append((block.down, "linear", "sum"))
    return {layer.name: geometry_of(layer, *row) for layer, *row in rows}


def with_algorithms(spec: EncoderSpec, runner: LayerRunner) -> EncoderSpec:
    """The encoder with each layer's algorithm that is correct on this
    machine."""
    found = find_algorithms(encoder_geometries(spec), runner)
    return spec.with_layers(
        lambda x: replace(x, algorithm=found.get(x.name, NATIVE))
    )


def heads_with_algorithms(
    layers: Mapping[str, IntegerLayer], runner: LayerRunner
) -> dict[str, IntegerLayer]:
    """:func:`with_algorithms` for layers outside of an encoder."""
    geometries = {n: geometry_of(x, "head") for n, x in layers.items()}
    found = find_algorithms(geometries, runner)
    return {n: replace(x, algorithm=found[n]) for n, x in layers.items()}


_TRIED = "a small layer"

_SMALL = Geometry("linear", "", (64, 64), weight_bits=7, activation_bits=8)


def why_not(runner: LayerRunner) -> str | None:
    """Why a runtime cannot be used here at all, or None. It computes a small
    layer, which must be right in integers."""
    memory = _Memory(runner)
    if memory.known().get(_TRIED):
        return None
    algorithm, reason, _ = exact_algorithm(_SMALL, runner)
    if algorithm != NATIVE:
        return f"it was tried on this CPU with a small layer: {reason}"
    memory.add({_TRIED: [NATIVE, ""]})
    return None
