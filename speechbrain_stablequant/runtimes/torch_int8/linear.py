"""Products with a weight matrix, fused with what follows them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from ...core.affine import GELU_MIN
from ...core.integer_layer import AnyLayer, IntegerLayer
from ...utils.memory import transient
from ..algorithms import window_rows
from ..base import round_frames
from ..cpu import cpu_class
from ..geometry import FLOAT, NATIVE
from .input_forms import Floats, Form, Grid, form_of

#: Products have a multiple of this number of rows, see :func:`padded_rows`.
ROWS = 8

#: From twice as many ROWS on: numbers of rows before each doubling.
ROW_STEPS = 16

#: Up to so many rows, as in the steps of a decoder, FBGEMM multiplies faster:
#: 4 times on a CPU without VNNI, where oneDNN is slower than floats.
FEW = 16


#: Float32 [out] each: a norm over time as product * gain + shift.
GainShift = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """Weight rows of layers that share an input form."""

    weight: torch.Tensor  # [out, in], int8 or float
    scale: torch.Tensor | None  # float32 [out], of int8
    bias: torch.Tensor | None  # float32 [out]
    form: Form  # of the input
    algorithm: str = NATIVE


def rows_of(layer: AnyLayer, dtype: torch.dtype, gain: float = 1.0) -> Rows:
    """A layer's weight as rows, times ``gain``. A Conv1d takes [..., kernel
    * in]: the frames of a window one after the other."""
    weight = layer.loaded().weight
    if layer.kind == "conv1d":
        weight = window_rows(weight)
    bias = layer.bias if layer.bias is None else layer.bias * gain
    form = form_of(layer, dtype)
    if isinstance(form, Floats):
        weight = weight if gain == 1.0 else weight * gain
        return Rows(weight.to(form.dtype), None, bias, form)
    scale = layer.weight_scale.float() * gain
    return Rows(weight, scale, bias, form, layer.algorithm)


def padded_rows(rows: int) -> int:
    """A number of rows to compute at once: oneDNN keeps a primitive of 0.1 to
    0.4 MB for each number that it meets, up to 1,024 of them."""
    return round_frames(rows, ROWS, ROW_STEPS)


def _stacked(rows: Sequence[Rows]) -> Rows:
    if len(rows) == 1:
        return rows[0]
    bias = scale = None
    if any(r.bias is not None for r in rows):
        zeros = (torch.zeros(len(r.weight)) for r in rows)
        pairs = zip(rows, zeros, strict=True)
        bias = torch.cat([z if r.bias is None else r.bias for r, z in pairs])
    if rows[0].scale is not None:
        scale = torch.cat([r.scale for r in rows])
    weights = [r.weight for r in rows]
    count = sum(len(w) for w in weights)
    weight = transient((count, weights[0].shape[1]), weights[0].dtype)
    torch.cat(weights, out=weight)
    return replace(rows[0], weight=weight, scale=scale, bias=bias)


def onednn_operators() -> Any:
    """torch's oneDNN integer operators; RuntimeError if this build has none,
    as on macOS."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        raise RuntimeError(
            "this build of torch has no oneDNN operators for integers"
        )
    return torch.ops.onednn


class IntegerLinear:
    """int8 products by oneDNN, int32 sums."""

    def __init__(self, rows: Rows):
        self.form: Grid = rows.form
        self.scale = rows.scale
        self.bias = rows.bias
        self._zeros = torch.zeros(rows.scale.shape, dtype=torch.int64)
        prepack = onednn_operators().qlinear_prepack
        weight = prepack(rows.weight.contiguous(), None)
        # What the operators take after the input.
        self._operands = (self.form.scale, self.form.zero, weight)

    def _run(
        self,
        x: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        *result: Any,
    ) -> torch.Tensor:
        multiply = torch.ops.onednn.qlinear_pointwise.default
        return multiply(x, *self._operands, scale, self._zeros, bias, *result)

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply [rows, in], prepared by ``form``, to [rows, out] of
        float32 or bfloat16."""
        result = (1.0, 0, dtype, "none", [], "")
        return self._run(x, self.scale, self.bias, *result)

    def gelu(
        self,
        x: torch.Tensor,
        form: Form,
        norm: GainShift | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """GELU of the product, in another form; with ``norm`` of product *
        gain + shift without the bias."""
        scale, shift = self.scale, self.bias
        if norm is not None:
            gain, shift = norm
            scale = scale * gain
        result = (form.scale, form.zero, form.dtype, "gelu", [], "none")
        q = self._run(x, scale, shift, *result)
        return form.clip(q, out, GELU_MIN)

    def add_(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Add the product to ``total`` [rows, out] in place."""
        result = (1.0, 0, total.dtype, 1.0, 0, "sum", 1.0, "none", [], "")
        operands = (*self._operands, self.scale, self._zeros, total, self.bias)
        multiply = torch.ops.onednn.qlinear_pointwise.binary
        return multiply(x, *operands, *result)


class FloatLinear:
    """Products of a layer that the plan leaves in floating point; methods as of
    :class:`IntegerLinear`."""

    def __init__(self, rows: Rows):
        self.form: Form = rows.form
        self._weight, bias = rows.weight, rows.bias
        self._bias = None if bias is None else bias.to(rows.weight.dtype)

    def product(
        self, x: torch.Tensor, norm: GainShift | None = None
    ) -> torch.Tensor:
        if norm is None:
            return F.linear(x, self._weight, self._bias)
        gain, shift = norm
        return F.linear(x, self._weight) * gain + shift

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.product(x).to(dtype)

    def gelu(
        self,
        x: torch.Tensor,
        form: Form,
        norm: GainShift | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return form.prepare(F.gelu(self.product(x, norm)), out)

    def add_(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return total.add_(self.product(x))


class ConvertedLinear(FloatLinear):
    """Products of integers that are multiplied as floats."""

    def __init__(self, rows: Rows):
        super().__init__(replace(rows, weight=rows.weight.float()))
        self._scale = rows.scale * self.form.scale

    def product(
        self, x: torch.Tensor, norm: GainShift | None = None
    ) -> torch.Tensor:
        gain, shift = norm or (1.0, self._bias)
        # Without the zero point, so that sums stay small.
        y = F.linear(x.float().sub_(self.form.zero), self._weight)
        y.mul_(self._scale * gain)
        return y if shift is None else y.add_(shift)


class FewRows:
    """int8 products of up to ``FEW`` rows by FBGEMM, int32 sums."""

    def __init__(self, layer: IntegerLayer):
        rows = rows_of(layer, torch.float32)
        self._form: Grid = rows.form
        self._edges = rows.form.edges()
        zeros = torch.zeros(len(rows.scale), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(
            rows.weight, rows.scale.double(), zeros, 0
        )
        self._packed = torch.ops.quantized.linear_prepack(weight, rows.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply float [rows, in] to float32."""
        ops, form = torch.ops.quantized, self._form
        return ops.linear_with_input_q_dq_qweight_dq_output_fp32(
            x.float().clamp(*self._edges), form.scale, form.zero, self._packed
        )


def has_few_rows(layer: AnyLayer) -> bool:
    """Whether :class:`FewRows` multiplies a layer here: FBGEMM's sums saturate
    with VNNI but no AVX-512."""
    engine = torch.backends.quantized.engine
    known = cpu_class().name in ("avx2", "avx512_vnni", "amx")
    return known and engine in ("x86", "fbgemm") and layer.algorithm == NATIVE


Linear = IntegerLinear | FloatLinear


def _product(rows: Rows) -> Linear:
    if isinstance(rows.form, Floats):
        return FloatLinear(rows)
    converted = rows.algorithm == FLOAT
    return ConvertedLinear(rows) if converted else IntegerLinear(rows)


def make_linear(layer: AnyLayer, dtype: torch.dtype) -> Linear:
    """The product of one layer, see :func:`rows_of`."""
    return _product(rows_of(layer, dtype))


class SharedInput:
    """Products of one input, stacked where they share a form."""

    def __init__(self, rows: Sequence[Rows]):
        groups = itertools.groupby(rows, lambda r: (r.form, r.algorithm))
        self.products = [_product(_stacked(list(g))) for _, g in groups]

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply float [rows, in] to [rows, sum of out]."""
        results = [p(p.form.prepare(x), dtype) for p in self.products]
        return results[0] if len(results) == 1 else torch.cat(results, 1)
