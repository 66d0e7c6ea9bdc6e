"""Forms of activations: integers on a layer's scale, or 16-bit floats.

A layer says which form it takes and is told which form to return, so that
quantizing is fused into whatever comes before.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ...core.affine import qmax
from ...core.encoder_spec import AnyLayer, Norm
from ...core.integer_layer import FloatLayer

OPS = torch.ops.stablequant


@dataclass(frozen=True)
class Form:
    """How an activation is represented."""

    dtype: torch.dtype  # int8 for integers
    inverse: float = 1.0  # 1 / scale of the integers
    limit: int = 127  # the largest integer
    zero_point: int = 0  # the integer that 0 becomes

    @property
    def quantized(self) -> bool:
        """Whether it holds integers."""
        return self.dtype == torch.int8

    def arguments(self) -> tuple[torch.dtype, float, int, int]:
        """The last arguments of the operators."""
        return self.dtype, self.inverse, self.limit, self.zero_point


class Place(NamedTuple):
    """Where an encoder computes, and the dtype of its float activations."""

    device: torch.device
    dtype: torch.dtype


def input_form(layer: AnyLayer, dtype: torch.dtype) -> Form:
    """The form that a layer takes; ``dtype`` is that of float activations."""
    if isinstance(layer, FloatLayer):
        return Form(dtype)
    # in float32, as affine.quantize computes it
    inverse = 1.0 / layer.activation_scale.float().reshape(())
    limit = qmax(layer.activation_bits)
    return Form(torch.int8, float(inverse), limit, layer.zero_point())


def convert(x: torch.Tensor, form: Form, gelu: bool = False) -> torch.Tensor:
    """A float activation to a form, after a GELU if asked."""
    if form.quantized:
        return OPS.quantize(x, form.inverse, form.limit, gelu, form.zero_point)
    return (F.gelu(x) if gelu else x).to(form.dtype)


def normalize(
    norm: Norm | None, x: torch.Tensor, form: Form, gelu: bool = False
) -> torch.Tensor:
    """LayerNorm unless it is None, GELU if asked, to a form."""
    if norm is None:
        return convert(x, form, gelu)
    return OPS.layer_norm(
        x, norm.weight, norm.bias, norm.eps, gelu, *form.arguments()
    )


def move_norm(norm: Norm | None, device: torch.device) -> Norm | None:
    """A norm with float32 parameters on a device."""
    if norm is None:
        return None
    weight, bias = (
        p.to(device, torch.float32).contiguous()
        for p in (norm.weight, norm.bias)
    )
    return Norm(weight, bias, norm.eps, norm.over_time)
