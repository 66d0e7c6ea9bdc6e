"""Convolutions of any geometry over [batch, time, channels]."""

import torch
from torch.nn import functional as F

from ...integer import FloatLayer, IntegerLayer
from .forms import Floats, Grid, form_of


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
            self.form.zero,
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
            self.form.zero,
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
) -> IntegerConv | FloatConv:
    """The convolution of a layer.

    Arguments
    ---------
    layer : IntegerLayer or FloatLayer
        A Conv1d.
    dtype : torch.dtype
        Of a layer that is not quantized.

    Returns
    -------
    IntegerConv or FloatConv
    """
    if isinstance(layer, FloatLayer):
        return FloatConv(layer, dtype)
    return IntegerConv(layer)
