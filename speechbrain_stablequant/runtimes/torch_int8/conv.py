"""Convolutions of any geometry over [batch, time, channels].

All take an input prepared by their ``form`` and give float32 or bfloat16.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from ...core.integer_layer import AnyLayer, FloatLayer, IntegerLayer
from ..algorithms import join_groups, split_groups
from ..geometry import CONVOLUTION, FLOAT, JOINED_GROUPS, NATIVE, WINDOW_PRODUCT
from .input_forms import Grid, form_of
from .linear import make_linear, onednn_operators, padded_rows


def _geometry(layer: AnyLayer) -> tuple[list[int], list[int], list[int], int]:
    return [layer.stride], [layer.padding], [layer.dilation], layer.groups


class IntegerConv:
    """int8 convolution by oneDNN, int32 sums."""

    def __init__(self, layer: IntegerLayer):
        self.form: Grid = form_of(layer, torch.float32)
        scale, geometry = layer.weight_scale.float(), _geometry(layer)
        grid = (self.form.scale, self.form.zero)
        prepack = onednn_operators().qconv_prepack
        weight = layer.loaded().weight.contiguous()
        weight = prepack(weight, scale, *grid, *geometry, None)
        zeros = torch.zeros(scale.shape, dtype=torch.int64)
        # What the operator takes after the input.
        self._operands = (*grid, weight, scale, zeros, layer.bias, *geometry)

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        convolve = torch.ops.onednn.qconv1d_pointwise.default
        result = (1.0, 0, dtype, "none", [], None)
        return convolve(x.mT, *self._operands, *result).mT


class GroupedConv:
    """int8 convolution without dilation as products with windows, one group
    after the other.

    oneDNN's own convolution has half their speed where groups are as narrow as
    in a positional embedding.
    """

    #: Frames of a group whose windows are in memory at a time.
    rows = 512

    def __init__(self, layer: IntegerLayer):
        self._groups, self._padding = layer.groups, layer.padding
        self._kernel, self._stride = layer.weight.shape[-1], layer.stride
        self._products = [
            make_linear(group, torch.float32)
            for group in split_groups(layer.loaded())
        ]
        self.form: Grid = self._products[0].form

    def _utterance(
        self, x: torch.Tensor, dtype: torch.dtype, out: torch.Tensor
    ) -> None:
        width = x.shape[1] // self._groups
        step = self._stride * width
        targets = out.chunk(self._groups, 1)
        rows = max(min(self.rows, len(out)), 1)
        # One buffer for all groups: allocation is slow.
        scratch = x.new_zeros(padded_rows(rows), self._kernel * width)
        for index, product in enumerate(self._products):
            own = x[:, index * width : (index + 1) * width].contiguous()
            for start in range(0, len(out), rows):
                target = targets[index][start : start + rows]
                windows = scratch[: len(target)]
                steps, place = (step, 1), start * step
                windows.copy_(own.as_strided(windows.shape, steps, place))
                padded = scratch[: padded_rows(len(target))]
                target.copy_(product(padded, dtype)[: len(target)])

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        margin = (0, 0, self._padding, self._padding)
        x = F.pad(x, margin, value=self.form.zero)
        frames = (x.shape[1] - self._kernel) // self._stride + 1
        width = sum(len(product.scale) for product in self._products)
        out = torch.empty(len(x), frames, width, dtype=dtype)
        for one, target in zip(x, out, strict=True):
            self._utterance(one, dtype, target)
        return out


class FloatConv:
    """Convolution of a layer that the plan leaves in floating point."""

    def __init__(self, layer: AnyLayer, dtype: torch.dtype):
        self.form = form_of(layer, dtype)
        layer = layer.loaded()
        self._weight = layer.weight.to(dtype)
        self._bias = None if layer.bias is None else layer.bias.to(dtype)
        self._geometry = _geometry(layer)

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out = F.conv1d(x.mT, self._weight, self._bias, *self._geometry)
        return out.mT.to(dtype)


class ConvertedConv(FloatConv):
    """Convolution of integers that are multiplied as floats."""

    def __init__(self, layer: IntegerLayer):
        super().__init__(replace(layer, bias=None), torch.float32)
        self._scale = layer.weight_scale.float() * self.form.scale
        self._shift = layer.bias

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = x.float().sub_(self.form.zero)
        y = super().__call__(x, torch.float32) * self._scale
        return (y if self._shift is None else y.add_(self._shift)).to(dtype)


Conv = IntegerConv | GroupedConv | FloatConv


def conv_algorithms(
    integers: bool, groups: int, dilation: int
) -> tuple[str, ...]:
    """Algorithms for a convolution, the fastest first."""
    if not integers:
        joined = (JOINED_GROUPS,) if groups > 1 else ()
        return (NATIVE, *joined, FLOAT)
    if dilation != 1:
        return (NATIVE, FLOAT)
    other = CONVOLUTION if groups > 1 else WINDOW_PRODUCT
    return (NATIVE, other, FLOAT)


def make_conv(layer: AnyLayer, dtype: torch.dtype) -> Conv:
    """The convolution of a layer; ``dtype`` applies if it is not quantized."""
    algorithm = layer.algorithm
    if isinstance(layer, FloatLayer):
        if algorithm == JOINED_GROUPS:
            layer = join_groups(layer)
        return FloatConv(layer, form_of(layer, dtype).dtype)
    if algorithm == FLOAT:
        return ConvertedConv(layer)
    windows = layer.groups > 1 and layer.dilation == 1
    if algorithm == WINDOW_PRODUCT or (windows and algorithm == NATIVE):
        return GroupedConv(layer)
    return IntegerConv(layer)
