"""Convolutions of any geometry over [batch, time, channels]."""

import torch
from torch.nn import functional as F

from ...integer import FloatLayer, IntegerLayer
from .forms import ZERO, Floats, Grid, form_of
from .linear import IntegerLinear, Rows, rows_of


class IntegerConv:
    """int8 convolution by oneDNN, int32 sums.

    Arguments
    ---------
    layer : IntegerLayer
        A Conv1d.
    """

    def __init__(self, layer: IntegerLayer):
        self.form: Grid = form_of(layer, torch.float32)
        self._scale = layer.weight_scale.float()
        self._bias = layer.bias
        self._zeros = torch.zeros(self._scale.shape, dtype=torch.int64)
        self._geometry = (
            [layer.stride],
            [layer.padding],
            [layer.dilation],
            layer.groups,
        )
        self._weight = torch.ops.onednn.qconv_prepack(
            layer.loaded().weight.contiguous(),
            self._scale,
            self.form.scale,
            ZERO,
            *self._geometry,
            None,
        )

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The convolution.

        Arguments
        ---------
        x : torch.Tensor
            [batch, time, in] in this convolution's form.
        dtype : torch.dtype
            Of the result, float32 or bfloat16.

        Returns
        -------
        torch.Tensor
            [batch, time, out].
        """
        out = torch.ops.onednn.qconv1d_pointwise.default(
            x.transpose(1, 2),
            self.form.scale,
            ZERO,
            self._weight,
            self._scale,
            self._zeros,
            self._bias,
            *self._geometry,
            1.0,
            0,
            dtype,
            "none",
            [],
            None,
        )
        return out.transpose(1, 2)


class GroupedConv:
    """The same with one product for each group: with windows of its input,
    one after the other.

    oneDNN's convolution has half their speed where groups are as narrow as
    in a positional embedding.

    Arguments
    ---------
    layer : IntegerLayer
        A Conv1d without dilation.
    """

    #: Frames of a group whose windows exist at a time.
    rows = 512

    def __init__(self, layer: IntegerLayer):
        layer = layer.loaded()
        self._groups, self._padding = layer.groups, layer.padding
        self._kernel, self._stride = layer.weight.shape[-1], layer.stride
        every = rows_of(layer, torch.float32)
        self.form: Grid = every.form
        size = len(every.weight) // layer.groups
        parts = [slice(i, i + size) for i in range(0, len(every.weight), size)]
        self._products = [
            IntegerLinear(
                Rows(
                    every.weight[part],
                    every.scale[part],
                    None if every.bias is None else every.bias[part],
                    every.form,
                )
            )
            for part in parts
        ]

    def _utterance(
        self, x: torch.Tensor, dtype: torch.dtype, out: torch.Tensor
    ) -> None:
        width = x.shape[1] // self._groups
        targets = out.chunk(self._groups, 1)
        rows = max(min(self.rows, len(out)), 1)
        # Of all groups: memory that is new each time costs more.
        scratch = x.new_empty(rows, self._kernel * width)
        for index, product in enumerate(self._products):
            own = x[:, index * width : (index + 1) * width].contiguous()
            for start in range(0, len(out), rows):
                target = targets[index][start : start + rows]
                windows = scratch[: len(target)]
                windows.copy_(
                    own.as_strided(
                        windows.shape,
                        (self._stride * width, 1),
                        start * self._stride * width,
                    )
                )
                target.copy_(product(windows, dtype))

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`IntegerConv`."""
        x = F.pad(x, (0, 0, self._padding, self._padding), value=ZERO)
        frames = (x.shape[1] - self._kernel) // self._stride + 1
        width = sum(len(product.scale) for product in self._products)
        out = torch.empty(len(x), frames, width, dtype=dtype)
        for one, target in zip(x, out, strict=True):
            self._utterance(one, dtype, target)
        return out


class FloatConv:
    """The same of a layer that the plan leaves in floating point.

    Arguments
    ---------
    layer : FloatLayer
        A Conv1d.
    dtype : torch.dtype
        That it computes in.
    """

    def __init__(self, layer: FloatLayer, dtype: torch.dtype):
        self.form = Floats(dtype)
        self._weight = layer.weight.to(dtype)
        self._bias = None if layer.bias is None else layer.bias.to(dtype)
        self._geometry = (
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`IntegerConv`."""
        out = F.conv1d(
            x.transpose(1, 2), self._weight, self._bias, *self._geometry
        )
        return out.transpose(1, 2).to(dtype)


def make_conv(
    layer: IntegerLayer | FloatLayer, dtype: torch.dtype
) -> IntegerConv | GroupedConv | FloatConv:
    """The convolution of a layer.

    Arguments
    ---------
    layer : IntegerLayer or FloatLayer
        A Conv1d.
    dtype : torch.dtype
        Of a layer that is not quantized.

    Returns
    -------
    IntegerConv, GroupedConv or FloatConv
    """
    if isinstance(layer, FloatLayer):
        return FloatConv(layer, dtype)
    if layer.groups > 1 and layer.dilation == 1:
        return GroupedConv(layer)
    return IntegerConv(layer)
