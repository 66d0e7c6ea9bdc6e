"""A layer with known results: inputs, exact arithmetic, and the comparison.

Integers reach both ends of their ranges and scales are powers of two, so that
the results are known exactly in float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..core.affine import qmax
from ..core.integer_layer import AnyLayer, FloatLayer, IntegerLayer
from .geometry import WINDOW, Geometry

#: Output frames of each trial.
ROWS = (50, 500)

#: Scale of the inputs; not 1, so that a missing scale is detected.
_STEP = 2.0**-3

#: Bits of weights and inputs of a float layer: bfloat16 holds them exactly.
_FLOAT_BITS = 8

#: Relative error of two roundings to bfloat16.
_HALF_ROUNDING = 2.0**-7

#: Relative error of several roundings to float32.
_ROUNDING = 2.0**-21

#: Absolute error of a library's GELU.
_GELU_ERROR = 2e-5


class Trial(NamedTuple):
    """A layer of some geometry, and inputs for it."""

    layer: AnyLayer
    inputs: list[torch.Tensor]  # float32 [1, time, in]
    # float32 [1, frames, out], added to the results. A positional convolution
    # gives as many frames as it takes; the encoder drops the rest.
    others: list[torch.Tensor]


def _integers(
    shape: Sequence[int], limit: int, generator: torch.Generator
) -> torch.Tensor:
    """Random integers; some rows are all at the ends of the range."""
    count = math.prod(shape)
    # Eight bytes per draw: a large weight takes tenths of a second otherwise.
    words = torch.randint(
        -(2**63), 2**63 - 1, (count // 8 + 1,), generator=generator
    )
    bits = words.view(torch.int8)[:count]
    made = (bits >> (7 - limit.bit_length())).clamp_(-limit, limit)
    made = made.view(*shape)
    rows = made.flatten(1)
    step = max(len(rows) // 4, 3)
    for start, value in ((0, limit), (1, -limit), (2, limit)):
        rows[start::step] = value
    # Both ends alternate.
    rows[2::step, ::2] = -limit
    return made


def _scales(geometry: Geometry, in_limit: int, limit: int) -> torch.Tensor:
    """Powers of two that bring results to about 1 and differ from row to
    row: products are exact and swapped rows are detected."""
    outputs, *window = geometry.shape
    usual = in_limit * limit / 3 * math.sqrt(math.prod(window))
    base = 2.0 ** -round(math.log2(max(usual, 1.0)))
    return base * 2.0 ** (torch.arange(outputs) * 3 % 5 - 2).float() / _STEP


def make_trial(geometry: Geometry, half: bool = False) -> Trial:
    """A layer of a geometry and inputs, always the same; ``half``: inputs
    must be exact in bfloat16."""
    generator = torch.Generator("cpu").manual_seed(17)
    integer = geometry.weight_bits > 0
    in_bits = geometry.activation_bits or _FLOAT_BITS
    limit = qmax(geometry.weight_bits or _FLOAT_BITS)
    in_limit = qmax(in_bits)
    weight = _integers(geometry.shape, limit, generator)
    scale = _scales(geometry, in_limit, limit)
    outputs, width = geometry.shape[0], geometry.shape[1] * geometry.groups
    bias = None
    if geometry.bias:
        bias = torch.randint(-9, 10, (outputs,), generator=generator) / 8
    common = {
        "name": str(geometry),
        "kind": "conv1d" if geometry.is_conv else "linear",
        "bias": bias,
        **{key: getattr(geometry, key) for key in WINDOW},
    }
    zero = 0
    if integer:
        zero = -max(in_limit * 7 // 8, 1) if geometry.offset else 0
        layer = IntegerLayer(
            weight=weight,
            weight_scale=scale,
            weight_bits=geometry.weight_bits,
            activation_scale=torch.tensor([_STEP]),
            activation_bits=in_bits,
            activation_offset=-zero * _STEP,
            **common,
        )
    else:
        scale = scale.view(-1, *[1] * (weight.dim() - 1))
        layer = FloatLayer(weight=weight.float() * scale, **common)
    inputs, others = [], []
    for count in ROWS:
        length = geometry.inputs(count)
        q = _integers((length, width), in_limit, generator)
        x = (q.float() - zero) * _STEP
        if integer:
            x = _beside(x, zero, in_limit, half, generator)
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
    zero: int,
    limit: int,
    half: bool,
    generator: torch.Generator,
) -> torch.Tensor:
    """Inputs beyond the grid and, in float32, between its points, so that
    wrong clipping or rounding is detected."""
    chance = torch.rand(x.shape, generator=generator)
    x = torch.where(chance < 0.01, (2 * limit - zero) * _STEP, x)
    x = torch.where(chance > 0.99, (-2 * limit - zero) * _STEP, x)
    return x if half else x + (chance - 0.5) * 0.6 * _STEP


def _compared(rows: int) -> torch.Tensor:
    """Rows that are compared: both ends, and every few between, at varying
    places of a kernel's tile."""
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
    x = F.pad(x.T, (geometry.padding, geometry.padding))
    reach = geometry.dilation * (geometry.shape[2] - 1) + 1
    windows = x.unfold(1, reach, geometry.stride)
    windows = windows[:, rows, :: geometry.dilation].transpose(0, 1)
    parts = zip(
        windows.chunk(geometry.groups, 1),
        weight.chunk(geometry.groups),
        strict=True,
    )
    products = [x.flatten(1) @ own.double().flatten(1).T for x, own in parts]
    return torch.cat(products, 1)


class Expected(NamedTuple):
    """Exact results of some rows."""

    rows: torch.Tensor  # their indices
    values: torch.Tensor  # float64 [rows, out]
    bound: torch.Tensor  # float64 [rows, out]: allowed error


def expected_results(
    geometry: Geometry, trial: Trial, half: bool
) -> list[Expected]:
    """Exact results for each input of a trial; ``half``: results are
    bfloat16."""
    layer, weight = trial.layer, trial.layer.weight
    bias = 0.0 if layer.bias is None else layer.bias.double()
    zero, limit, scale, share = 0, math.inf, _STEP, 0.0
    furthest = trial.inputs[0].abs().max().double()
    if isinstance(layer, IntegerLayer):
        zero, limit = layer.zero_point(), qmax(layer.activation_bits)
        scale = _STEP * layer.weight_scale.double()
        furthest = (127 + 128 + abs(zero)) * scale
        # The zero point's share of the sums, which may be rounded like any
        # other number.
        sums = weight.flatten(1).sum(1, dtype=torch.int64).abs()
        share = (128 + abs(zero)) * scale * sums
    # Bound by the partial sums, not only by their result.
    rounding = furthest * weight.flatten(1).abs().sum(1, dtype=torch.float64)
    results = []
    for x, other in zip(trial.inputs, trial.others, strict=True):
        rows = _compared(other.shape[1])
        q = (x[0].double() / _STEP + zero).round_().clamp_(-limit, limit) - zero
        product = _exact_product(geometry, weight, q, rows) * scale
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
    """What a runtime computed for a trial."""

    # float [1, frames, out] for each input, repeated if a layer is computed
    # more than once
    values: list[torch.Tensor]
    step: float = 0.0  # of the grid that values were rounded to, if any
    top: float = math.inf  # upper end of that grid


def difference(found: Results, expected: Sequence[Expected]) -> str | None:
    """How results differ from exact ones beyond rounding, in words that
    follow "the result"; None if they do not."""
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
