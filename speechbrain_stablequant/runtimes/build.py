"""Builds a runtime, the forwards that replace those of the float model, and
checks it by a probe."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.encoder_spec import describe_encoder, described_encoders
from ..core.integer_layer import IntegerLayer, in_integers
from ..core.parts import Part
from ..model.encoders import Encoder, find_encoders
from ..utils import forks
from . import simulated
from .base import LayerExecutor, Runtime
from .cpu import CpuClass, cpu_class, executed_integers, in_half
from .forwards import (
    encoder_forward,
    find_modules,
    in_own_precision,
    layer_forwards,
)
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


def _described(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> bool:
    """Whether a runtime has an encoder of the integer layers as a whole."""
    found = described_encoders(modules, integers)
    paths = tuple(f"{encoder.path}." for encoder in found)
    return any(name.startswith(paths) for name in integers)


def build_forwards(
    backend: str,
    modules: Mapping[str, nn.Module],
    integers: Mapping[str, IntegerLayer],
    cpu: CpuClass | None = None,
    parts: Iterable[Part] = (),
    residual_amax: float | None = None,
    **options: Any,
) -> dict[nn.Module, Callable[..., Any]]:
    """Build a runtime, with its options: the function that replaces the
    forward of each module, for ``shadowed_forwards``.

    Weights of integer layers in ``modules`` are not read; they may be on the
    ``meta`` device; those of weight-only layers are used. ``cpu`` is the one
    whose integers are executed, by default this one; ``parts`` and
    ``residual_amax`` are the plan's.
    ValueError for a layer that is not in the model, an encoder or layer that
    this runtime cannot execute, and :class:`UnusableRuntime` if it is wrong on
    this machine.
    """
    forks.protect_children()
    runtime, integers = RUNTIMES[backend], in_integers(integers)
    if runtime.device == "cpu":
        integers = executed_integers(integers, cpu or cpu_class())
    if not runtime.streams:
        integers = {name: x.loaded() for name, x in integers.items()}
    find_modules(modules, integers)
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    heads = dict(integers)
    if parts and runtime.part is not None and not _described(modules, integers):
        return _forwards_of_parts(runtime, modules, integers, parts, options)
    if runtime.encoder is not None:
        make_executor = load_function(runtime.encoder)
        for encoder in _encoders(modules, integers):
            spec = describe_encoder(encoder.model, encoder.path, integers)
            spec = replace(spec, residual_amax=residual_amax)
            if runtime.layer_runner is not None:
                runner = load_function(runtime.layer_runner)(**options)
                spec = with_algorithms(spec, runner)
            executor = make_executor(spec, **options)
            execute = encoder_forward(executor)
            forwards[encoder.model] = in_own_precision(execute)
            for layer in spec.layers():
                heads.pop(layer.name, None)
    made = _made_layers(runtime.layer, heads)
    rest = {name: in_own_precision(forward) for name, forward in made.items()}
    return {**forwards, **layer_forwards(modules, rest)}


def _made_layers(
    reference: str, layers: Mapping[str, IntegerLayer]
) -> dict[str, LayerExecutor]:
    """Executors of layers outside of encoders; two-dimensional convolutions,
    which no runtime multiplies in integers, are simulated."""
    planes = {n: x for n, x in layers.items() if x.kind == "conv2d"}
    layers = {n: x for n, x in layers.items() if n not in planes}
    if planes:
        logger.warning(
            "%s (%d layers): two-dimensional convolutions are computed in "
            "float32 from their integers",
            next(iter(planes)),
            len(planes),
        )
    if reference == Runtime.layer:
        runner = load_function(RUNTIMES["torch_int8"].layer_runner)()
        layers = heads_with_algorithms(layers, runner)
    make_layer = load_function(reference)
    made = {name: make_layer(layer) for name, layer in layers.items()}
    return made | {n: simulated.make_layer(x) for n, x in planes.items()}


def _forwards_of_parts(
    runtime: Runtime,
    modules: Mapping[str, nn.Module],
    integers: Mapping[str, IntegerLayer],
    parts: Iterable[Part],
    options: Mapping[str, Any],
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards of the parts that are graphs, and of every layer: a part that
    is called in another way computes by its layers."""
    make_part = load_function(runtime.part)
    forwards = in_place_forwards(modules, integers)
    graphs = [part for part in parts if part.executes == "graph"]
    found = find_modules(modules, [part.name for part in graphs])
    for part in graphs:
        module = found[part.name]
        forward = make_part(part, module, integers, **options)
        forwards[module] = in_own_precision(forward)
    return forwards


def in_place_forwards(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards of layers on a CPU one by one, each made by its first call."""
    return layer_forwards(
        modules,
        {n: in_own_precision(_InPlace(x)) for n, x in integers.items()},
    )


class _InPlace:
    """The forward of a layer; deep copies share it."""

    def __init__(self, layer: IntegerLayer):
        self._layer = layer
        self._forward: LayerExecutor | None = None

    def __deepcopy__(self, memo: dict) -> "_InPlace":
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._forward is None:
            layers = {self._layer.name: self._layer}
            (self._forward,) = _made_layers(Runtime.layer, layers).values()
        return self._forward(x)


def executed_form(backend: str, cpu: CpuClass | None = None) -> str:
    """Which weights a runtime executes: ``OWN`` or ``SEVEN_BITS``."""
    exact = (cpu or cpu_class()).exact
    return OWN if exact or RUNTIMES[backend].device != "cpu" else SEVEN_BITS


def rounds_to_half(backend: str, options: Mapping[str, Any]) -> bool:
    """Whether a runtime may round to 16 bits between integer products."""
    runtime = RUNTIMES[backend]
    chosen = vars(runtime.options(**options))
    if runtime.simulates:
        return False
    if "dtype" in chosen:
        return chosen["dtype"] != "float32"
    return in_half(chosen.get("precision", "auto"))


def check_probe(
    backend: str,
    probe: Probe,
    compute: Compute,
    device: torch.device,
    options: Mapping[str, Any],
) -> None:
    """Raise :class:`ProbeError` unless a runtime with these options answers a
    probe correctly."""
    half = rounds_to_half(backend, options)
    difference = probe.difference(compute, executed_form(backend), device, half)
    if difference is not None:
        raise ProbeError(
            f"backend: {backend} computes something else on this machine: "
            f"{difference}; write backend: auto"
        )
