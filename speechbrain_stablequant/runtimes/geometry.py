"""Whether a CPU runtime computes each layer of a model as it should.

A library's kernel that is wrong for one geometry on one CPU gives wrong words,
and no error. So each distinct geometry is computed once on a machine by the
runtime's own code, from integers that reach both ends of their ranges, and
compared with exact arithmetic. One that is wrong is computed another way in
the same runtime; without an exact way the runtime is not used.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional as F

from ..core.affine import qmax
from ..core.integer_layer import FloatLayer, IntegerLayer
from ..model.encoder_spec import AnyLayer, EncoderSpec
from ..utils.files import code_identity, identity
from ..utils.store import machine_store
from ..utils.typed import one_line, typed
from .algorithms import NATIVE
from .cpu import machine_identity

logger = logging.getLogger(__name__)

FORMAT = 1

_WHAT = "layers tried on this CPU"

#: Frames of the results that are compared.
ROWS = (50, 500)

#: Magnitude of the weights and the inputs of a layer that stays float: with
#: so many bits bfloat16 holds them exactly.
_FLOAT_BITS = 8

#: A value that is rounded to bfloat16 on its way to another that is, too.
_HALF_ROUNDING = 2.0**-7
#: The same for some roundings to float32.
_ROUNDING = 2.0**-21
#: How exactly a library knows the GELU.
_GELU_ERROR = 2e-5


class UnusableRuntime(ValueError):
    """A runtime does not compute here what it should."""


@dataclass(frozen=True)
class Geometry:
    """What decides which kernel a layer is computed with.

    Arguments
    ---------
    place : str
        ``"first"`` and ``"front"`` convolution of the feature extractor,
        ``"position"``, ``"linear"``; ``"head"`` outside of the encoder.
    then : str
        What the result goes into: ``"gelu"``, ``"sum"`` with the residual
        stream, ``"shared"`` for products of one input, or nothing.
    shape : tuple of int
        Of the weight.
    stride, padding, dilation, groups : int
        Of a convolution.
    bias : bool
        Whether there is one.
    weight_bits, activation_bits : int
        0 for a layer that stays float.
    offset : bool
        Whether the zero point of its input is another than 0.
    """

    place: str
    then: str
    shape: tuple[int, ...]
    stride: int
    padding: int
    dilation: int
    groups: int
    bias: bool
    weight_bits: int = 0
    activation_bits: int = 0
    offset: bool = False

    def __str__(self) -> str:
        words = [self.place]
        if self.then:
            words.append(f"with {self.then}")
        words.append("x".join(map(str, self.shape)))
        for key, usual in (
            ("stride", 1),
            ("padding", 0),
            ("dilation", 1),
            ("groups", 1),
        ):
            value = getattr(self, key)
            if value != usual:
                words.append(f"{key} {value}")
        if self.weight_bits:
            words.append(f"W{self.weight_bits}A{self.activation_bits}")
        else:
            words.append("float")
        if self.offset:
            words.append("offset")
        if not self.bias:
            words.append("no bias")
        return " ".join(words)

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution."""
        return len(self.shape) == 3

    def inputs(self, rows: int) -> int:
        """Input frames that make so many rows, in whole strides."""
        if not self.is_conv:
            return rows
        reach = self.dilation * (self.shape[2] - 1) + 1 - 2 * self.padding
        return (rows + -(-reach // self.stride) - 1) * self.stride


def geometry_of(layer: AnyLayer, place: str, then: str = "") -> Geometry:
    """The geometry of a layer.

    Arguments
    ---------
    layer : IntegerLayer or FloatLayer
        The layer that is executed.
    place, then : str
        As of :class:`Geometry`.

    Returns
    -------
    Geometry

    Example
    -------
    >>> layer = FloatLayer("w", "linear", torch.ones(4, 2), None)
    >>> print(geometry_of(layer, "head"))
    head 4x2 float no bias
    """
    bits: dict[str, Any] = {}
    if isinstance(layer, IntegerLayer):
        bits = {
            "weight_bits": layer.weight_bits,
            "activation_bits": layer.activation_bits,
            "offset": bool(layer.zero_point()),
        }
    return Geometry(
        place,
        then,
        tuple(layer.weight.shape),
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        **bits,
    )


def encoder_geometries(spec: EncoderSpec) -> dict[str, Geometry]:
    """The geometries of an encoder.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder that is executed.

    Returns
    -------
    dict
        Geometry by name of the layer.
    """
    found = {}

    def add(layer: AnyLayer, place: str, then: str = "") -> None:
        found[layer.name] = geometry_of(layer, place, then)

    for index, stage in enumerate(spec.convs):
        conv = stage.conv
        if conv.padding or conv.dilation != 1 or conv.groups != 1:
            continue  # refused by the runtimes, in their own words
        at_once = stage.norm is None or stage.norm.over_time
        place = "front" if index else "first"
        add(stage.conv, place, "gelu" if at_once else "")
    add(spec.projection, "linear")
    add(spec.pos_conv, "position")
    for block in spec.blocks:
        for layer in (block.query, block.key, block.value):
            add(layer, "linear", "shared")
        add(block.out, "linear", "sum")
        add(block.up, "linear", "gelu")
        add(block.down, "linear", "sum")
    return found


# -- a layer with known results --------------------------------------------


class Trial(NamedTuple):
    """A layer of a geometry, and inputs for it.

    Arguments
    ---------
    layer : IntegerLayer or FloatLayer
        The layer.
    inputs : list of torch.Tensor
        float32 [1, time, in].
    others : list of torch.Tensor
        float32 [1, frames, out], what results are added to. A positional
        convolution gives as many frames as it takes in, the encoder leaves
        out what is more.
    """

    layer: AnyLayer
    inputs: list[torch.Tensor]
    others: list[torch.Tensor]


def _integers(
    shape: Sequence[int], limit: int, generator: torch.Generator
) -> torch.Tensor:
    """Random integers of which some rows are all at the ends of the range."""
    count = math.prod(shape)
    # Eight at a time: a large weight takes tenths of a second otherwise.
    words = torch.randint(
        -(2**63), 2**63 - 1, (count // 8 + 1,), generator=generator
    )
    bits = words.view(torch.int8)[:count]
    made = (bits >> (7 - limit.bit_length())).clamp_(-limit, limit)
    made = made.view(*shape)
    rows = made.flatten(1)
    for start, value in ((0, limit), (1, -limit), (2, limit)):
        rows[start :: max(len(rows) // 4, 3)] = value
    # Both ends beside each other.
    rows[2 :: max(len(rows) // 4, 3), ::2] = -limit
    return made


def _scales(geometry: Geometry, in_limit: int, limit: int) -> torch.Tensor:
    """Powers of two that bring results to about 1, different from row to
    row, so that products are exact and rows tell themselves apart."""
    outputs, *window = geometry.shape
    usual = in_limit * limit / 3 * math.sqrt(math.prod(window))
    base = 2.0 ** -round(math.log2(max(usual, 1.0)))
    return base * 2.0 ** (torch.arange(outputs) * 3 % 5 - 2).float()


def make_trial(
    geometry: Geometry, half: bool = False, rows: Sequence[int] = ROWS
) -> Trial:
    """A layer of a geometry and inputs, always the same.

    Arguments
    ---------
    geometry : Geometry
        The geometry.
    half : bool
        Whether inputs have to be exact in bfloat16.
    rows : sequence of int
        Frames of the results.

    Returns
    -------
    Trial
    """
    generator = torch.Generator("cpu").manual_seed(17)
    bits = geometry.weight_bits or _FLOAT_BITS
    in_bits = geometry.activation_bits or _FLOAT_BITS
    limit, in_limit = qmax(bits), qmax(in_bits)
    weight = _integers(geometry.shape, limit, generator)
    scale = _scales(geometry, in_limit, limit)
    outputs = geometry.shape[0]
    bias = None
    if geometry.bias:
        bias = torch.randint(-9, 10, (outputs,), generator=generator) / 8
    common = {
        "name": str(geometry),
        "kind": "conv1d" if geometry.is_conv else "linear",
        "bias": bias,
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
    }
    # Not 1: a scale that is forgotten must show.
    step = 2.0**-3
    zero = 0
    if geometry.weight_bits:
        zero = -max(in_limit * 7 // 8, 1) if geometry.offset else 0
        layer = IntegerLayer(
            weight=weight,
            weight_scale=scale / step,
            weight_bits=bits,
            activation_scale=torch.tensor([step]),
            activation_bits=in_bits,
            activation_offset=-zero * step,
            **common,
        )
    else:
        shape = (-1, *[1] * (weight.dim() - 1))
        layer = FloatLayer(
            weight=weight.float() * (scale / step).view(shape), **common
        )
    inputs, others = [], []
    for count in rows:
        width = geometry.shape[1] * geometry.groups
        length = geometry.inputs(count)
        q = _integers((length, width), in_limit, generator)
        x = (q.float() - zero) * step
        if geometry.weight_bits:
            x = _beside(x, step, zero, in_limit, half, generator)
        inputs.append(x[None])
        if geometry.place == "position":
            count = min(count, length)
        other = torch.randint(
            -99, 100, (1, count, outputs), generator=generator
        )
        others.append(other / 32)
    return Trial(layer, inputs, others)


def _beside(
    x: torch.Tensor,
    step: float,
    zero: int,
    limit: int,
    half: bool,
    generator: torch.Generator,
) -> torch.Tensor:
    """Inputs beyond the grid, and in float32 beside its points, so that what
    is cut and rounded to the grid shows."""
    chance = torch.rand(x.shape, generator=generator)
    x = torch.where(chance < 0.01, (2 * limit - zero) * step, x)
    x = torch.where(chance > 0.99, (-2 * limit - zero) * step, x)
    if not half:
        x = x + (chance - 0.5) * 0.6 * step
    return x


# -- exact arithmetic ------------------------------------------------------


def _compared(rows: int) -> torch.Tensor:
    """The rows that are compared with exact arithmetic: both ends, and one of
    each few between, at changing places of a kernel's tile."""
    step = 4 if rows <= 64 else 16
    places = torch.arange(0, rows, step)
    between = places + places // step * 5 % step
    ends = torch.cat([torch.arange(4), torch.arange(max(rows - 12, 0), rows)])
    found = torch.cat([between, ends])
    return found[found < rows].unique()


def _exact_product(
    geometry: Geometry,
    weight: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Rows of the product of integers [time, in], float64 [rows, out]."""
    if not geometry.is_conv:
        return x[rows] @ weight.double().T
    x = F.pad(x, (0, 0, geometry.padding, geometry.padding))
    taps = torch.arange(geometry.shape[2]) * geometry.dilation
    index = (rows[:, None] * geometry.stride + taps).flatten()
    width = geometry.shape[1]
    size = geometry.shape[0] // geometry.groups
    parts = []
    for group in range(geometry.groups):
        own = x[:, group * width : (group + 1) * width]
        windows = own[index].view(len(rows), -1)
        taken = weight[group * size : (group + 1) * size].double()
        parts.append(windows @ taken.transpose(1, 2).flatten(1).T)
    return torch.cat(parts, 1)


class Expected(NamedTuple):
    """Exact results of some rows.

    Arguments
    ---------
    rows : torch.Tensor
        Which ones.
    values, bound : torch.Tensor
        float64 [rows, out]: the results, and how far a right one may be off.
    """

    rows: torch.Tensor
    values: torch.Tensor
    bound: torch.Tensor


def expected_results(
    geometry: Geometry, trial: Trial, half: bool
) -> list[Expected]:
    """What exact arithmetic makes of a trial.

    Arguments
    ---------
    geometry : Geometry
        The geometry.
    trial : Trial
        Of :func:`make_trial`.
    half : bool
        Whether results are bfloat16.

    Returns
    -------
    list of Expected
        For each input.
    """
    layer = trial.layer
    scale, zero, limit, share = None, 0, math.inf, 0.0
    if isinstance(layer, IntegerLayer):
        step, zero = float(layer.activation_scale), layer.zero_point()
        limit = qmax(layer.activation_bits)
        weight, scale = layer.weight, step * layer.weight_scale.double()
        furthest = (127 + 128 + abs(zero)) * scale
        # Of the zero point of unsigned bytes in the sums: an offset that
        # may be rounded like any other number.
        sums = weight.flatten(1).sum(1, dtype=torch.int64).abs()
        share = (128 + abs(zero)) * scale * sums
    else:
        weight = layer.weight
        step, furthest = 1.0, trial.inputs[0].abs().max().double()
    bias = 0.0 if layer.bias is None else layer.bias.double()
    # Of the sums on the way, not only of what is left of them.
    rounding = furthest * weight.flatten(1).abs().sum(1, dtype=torch.float64)
    results = []
    for x, other in zip(trial.inputs, trial.others, strict=True):
        rows = _compared(other.shape[1])
        q = (
            (x[0].double() / step + zero).round_()
            if scale is not None
            else x[0]
        )
        q = q.double().clamp_(-limit, limit) - zero
        product = _exact_product(geometry, weight, q, rows)
        product = product if scale is None else product * scale
        values = product + bias
        bound = _ROUNDING * rounding.expand_as(values)
        if half:
            rounded = 2 * product.abs() + values.abs() + share
            bound = bound + _HALF_ROUNDING * rounded
        if geometry.then == "gelu":
            values = F.gelu(values)
            bound = 1.2 * bound + _GELU_ERROR
        elif geometry.then == "sum":
            added = other[0, rows].double()
            values = values + added
            if half:
                bound = bound + _HALF_ROUNDING * (added.abs() + values.abs())
        results.append(Expected(rows, values, bound + 1e-30))
    return results


class Results(NamedTuple):
    """What a runtime made of a trial.

    Arguments
    ---------
    values : list of torch.Tensor
        Float [1, frames, out] for each input; several after another of a
        runtime that computes a layer more than once.
    step, top : float
        Of the grid that these were rounded to and its upper end, if any.
    """

    values: list[torch.Tensor]
    step: float = 0.0
    top: float = math.inf


def difference(found: Results, expected: Sequence[Expected]) -> str | None:
    """How results differ from exact ones beyond rounding.

    Arguments
    ---------
    found : Results
        What was computed.
    expected : sequence of Expected
        Exact.

    Returns
    -------
    str or None
        Words that follow "the result"; None if they do not.
    """
    times = len(found.values) // len(expected)
    for place, out in enumerate(found.values):
        rows, values, bound = expected[place // times]
        frames = int(rows[-1]) + 1
        if out.shape != (1, frames, values.shape[1]):
            return f"has shape {list(out.shape)}"
        values = values.clamp(max=found.top)
        error = (out[0, rows].double() - values).abs()
        wrong = ~(error <= bound + 0.501 * found.step)  # or not a number
        if bool(wrong.any()):
            relative = float(error.norm() / values.norm())
            return (
                f"of {frames} rows is off by {relative:.2g} of the exact one "
                f"({int(wrong.sum())} of {wrong.numel()} values)"
            )
    return None


# -- runtimes --------------------------------------------------------------


class LayerRunner(Protocol):
    """Computes layers by the code of one runtime.

    Arguments
    ---------
    name : str
        Of the runtime.
    versions : Mapping
        What its results depend on beside the CPU and our code.
    """

    name: str
    versions: Mapping[str, str]

    def half(self, geometry: Geometry) -> bool:
        """Whether it computes a geometry in bfloat16, or its result is."""

    def algorithms(self, geometry: Geometry) -> tuple[str, ...]:
        """The ways that there are for a geometry, the fastest first."""

    def run(self, geometry: Geometry, trial: Trial) -> Results:
        """Computes a layer by its ``algorithm``.

        Arguments
        ---------
        geometry : Geometry
            The geometry.
        trial : Trial
            The layer and its inputs.

        Returns
        -------
        Results
        """


def exact_algorithm(
    geometry: Geometry, runner: LayerRunner
) -> tuple[str | None, str]:
    """The first way that computes a geometry right.

    Arguments
    ---------
    geometry : Geometry
        The geometry.
    runner : LayerRunner
        The runtime.

    Returns
    -------
    str or None
        The algorithm.
    str
        What was wrong with the first one, empty if nothing was.
    """
    half = runner.half(geometry)
    trial = make_trial(geometry, half)
    expected = expected_results(geometry, trial, half)
    first = ""
    for algorithm in runner.algorithms(geometry):
        layer = replace(trial.layer, algorithm=algorithm)
        try:
            found = runner.run(geometry, trial._replace(layer=layer))
            reason = difference(found, expected)
            if reason is None:
                return algorithm, first
            reason = f"the result {reason}"
        # whatever a library raises
        except Exception as error:
            reason = f"it fails: {one_line(error)}"
        first = first or reason
    return None, first


class _Memory:
    """What is remembered of a runtime on this machine."""

    def __init__(self, runner: LayerRunner):
        self._key = identity(
            {
                "format": FORMAT,
                "code": _code_digest(),
                "runtime": runner.name,
                "versions": dict(runner.versions),
                **machine_identity(),
            }
        )
        # Other settings of the same machine have files of their own.
        self._name = f"{runner.name}-{self._key[:12]}.json"
        self._store = machine_store("cpu")

    def known(self) -> dict[str, list[str]]:
        """Algorithm, and what was wrong with the native one, by geometry."""
        found = self._store.read(
            self._name,
            self._key,
            _WHAT,
            lambda raw: typed(raw, dict[str, list[str]], "content"),
        )
        return found or {}

    def add(self, found: Mapping[str, list[str]]) -> None:
        """Adds geometries."""
        self._store.update(self._name, self._key, found, _WHAT)


@functools.cache
def _code_digest() -> str:
    return code_identity(Path(__file__).parents[1])


def find_algorithms(
    geometries: Mapping[str, Geometry], runner: LayerRunner
) -> dict[str, str]:
    """How each layer of a model is computed here.

    What is found is remembered until the CPU, a library or our code changes.

    Arguments
    ---------
    geometries : Mapping
        Geometry by name of the layer.
    runner : LayerRunner
        The runtime.

    Returns
    -------
    dict
        Algorithm by name of the layer.

    Raises
    ------
    UnusableRuntime
        There is no exact one for a layer: names it and the difference.
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
        if key not in known:
            algorithm, reason = exact_algorithm(geometry, runner)
            if algorithm is None:
                raise UnusableRuntime(
                    f"backend: {runner.name} computes {layer} wrongly on this "
                    f"CPU ({key}: {reason}); write backend: auto"
                )
            fresh[key] = [algorithm, reason]
        algorithm, reason = fresh.get(key) or known[key]
        if reason:
            _say_once(
                f"{runner.name} computes {layer} wrongly on this CPU ({key}: "
                f"{reason}); this layer is computed as {algorithm} instead"
            )
    if fresh:
        memory.add(fresh)
    found = {**known, **fresh}
    return {name: found[str(g)][0] for name, g in geometries.items()}


@functools.cache
def _say_once(line: str) -> None:
    logger.warning(line)


def with_algorithms(spec: EncoderSpec, runner: LayerRunner) -> EncoderSpec:
    """An encoder whose layers are computed as it is right on this machine.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder that is executed.
    runner : LayerRunner
        The runtime.

    Returns
    -------
    EncoderSpec

    Raises
    ------
    UnusableRuntime
        See :func:`find_algorithms`.
    """
    found = find_algorithms(encoder_geometries(spec), runner)
    return spec.with_layers(
        lambda x: replace(x, algorithm=found.get(x.name, NATIVE))
    )


def heads_with_algorithms(
    layers: Mapping[str, IntegerLayer], runner: LayerRunner
) -> dict[str, IntegerLayer]:
    """The same for layers outside of an encoder.

    Arguments
    ---------
    layers : Mapping
        Layers by name.
    runner : LayerRunner
        The runtime.

    Returns
    -------
    dict
        Layers by name.
    """
    geometries = {n: geometry_of(x, "head") for n, x in layers.items()}
    found = find_algorithms(geometries, runner)
    return {n: replace(x, algorithm=found[n]) for n, x in layers.items()}


_TRIED = "a small layer"
_SMALL = Geometry("linear", "", (64, 64), 1, 0, 1, 1, True, 7, 8)


def why_not(runner: LayerRunner) -> str | None:
    """Why a runtime cannot be used here at all: it is given a small layer,
    which no runtime computes in floating point.

    Arguments
    ---------
    runner : LayerRunner
        The runtime.

    Returns
    -------
    str or None
        None if it can be used.
    """
    memory = _Memory(runner)
    if memory.known().get(_TRIED):
        return None
    algorithm, reason = exact_algorithm(_SMALL, runner)
    if algorithm != NATIVE:
        return f"it was tried on this CPU with a small layer: {reason}"
    memory.add({_TRIED: [NATIVE, ""]})
    return None
