"""Builds a runtime, the forwards that replace those of the float model, and
checks it by a probe."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..core.encoder_spec import describe_encoder
from ..core.integer_layer import IntegerLayer
from ..model.layers import Encoder, find_encoders
from ..utils import forks
from . import simulated
from .base import (
    Runtime,
    encoder_forward,
    in_own_precision,
    layer_forwards,
    modules_by_name,
)
from .cpu import CpuClass, cpu_class, executed_integers
from .layer_check import heads_with_algorithms, with_algorithms
from .probe import OWN, SEVEN_BITS, Compute, Probe, ProbeError
from .registry import RUNTIMES, load_function

logger = logging.getLogger(__name__)


def _encoders(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> list[Encoder]:
    """Each encoder with an integer layer once, under the key that names its
    layers: a model may be reached by two keys."""
    chosen: dict[int, Encoder] = {}
    for key, module in modules.items():
        for encoder in find_encoders({key: module}):
            if any(name.startswith(encoder.path + ".") for name in integers):
                chosen.setdefault(id(encoder.model), encoder)
    return list(chosen.values())


def build_forwards(
    backend: str,
    modules: Mapping[str, nn.Module],
    integers: Mapping[str, IntegerLayer],
    cpu: CpuClass | None = None,
    **options: Any,
) -> dict[nn.Module, Callable[..., Any]]:
    """Build a runtime, with its options: the function that replaces the
    forward of each module, for ``shadowed_forwards``.

    Weights of integer layers in ``modules`` are not read; they may be on the
    ``meta`` device. ``cpu`` is the one whose integers are executed, by default
    this one. ValueError for a layer that is not in the model, an encoder or
    layer that this runtime cannot execute, and :class:`UnusableRuntime` if it
    is wrong on this machine.
    """
    forks.protect_children()
    runtime = RUNTIMES[backend]
    if runtime.device == "cpu":
        integers = executed_integers(integers, cpu or cpu_class())
    if not runtime.streams:
        integers = {name: x.loaded() for name, x in integers.items()}
    modules_by_name(modules, integers)
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    heads = dict(integers)
    if runtime.encoder is not None:
        make_executor = load_function(runtime.encoder)
        for encoder in _encoders(modules, integers):
            spec = describe_encoder(encoder.model, encoder.path, integers)
            if runtime.layer_runner is not None:
                runner = load_function(runtime.layer_runner)(**options)
                spec = with_algorithms(spec, runner)
            executor = make_executor(spec, **options)
            execute = encoder_forward(executor)
            forwards[encoder.model] = in_own_precision(execute)
            for layer in spec.layers():
                heads.pop(layer.name, None)
    planes = _take_planes(heads)
    if runtime.layer == Runtime.layer:
        runner = load_function(RUNTIMES["torch_int8"].layer_runner)()
        heads = heads_with_algorithms(heads, runner)
    make_layer = load_function(runtime.layer)
    made = {name: make_layer(layer) for name, layer in heads.items()}
    made |= {n: simulated.make_layer(layer) for n, layer in planes.items()}
    rest = {name: in_own_precision(forward) for name, forward in made.items()}
    return {**forwards, **layer_forwards(modules, rest)}


def _take_planes(layers: dict[str, IntegerLayer]) -> dict[str, IntegerLayer]:
    """Removes and returns the two-dimensional convolutions, which no runtime
    multiplies in integers."""
    planes = {n: x for n, x in layers.items() if x.kind == "conv2d"}
    for name in planes:
        del layers[name]
    if planes:
        logger.warning(
            "%s (%d layers): two-dimensional convolutions are computed in "
            "float32 from their integers",
            next(iter(planes)),
            len(planes),
        )
    return planes


def executed_form(backend: str, cpu: CpuClass | None = None) -> str:
    """Which weights a runtime executes: ``OWN`` or ``SEVEN_BITS``."""
    exact = (cpu or cpu_class()).exact
    return OWN if exact or RUNTIMES[backend].device != "cpu" else SEVEN_BITS


def check_probe(
    backend: str, probe: Probe, compute: Compute, device: torch.device
) -> None:
    """Raise :class:`ProbeError` unless a runtime answers a probe correctly."""
    difference = probe.difference(compute, executed_form(backend), device)
    if difference is not None:
        raise ProbeError(
            f"backend: {backend} computes something else on this machine: "
            f"{difference}; write backend: auto"
        )
