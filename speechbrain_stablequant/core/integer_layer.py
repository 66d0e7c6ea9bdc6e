"""A layer as integers: what is stored and what runtimes compute with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional as F

from ..model.layer import layer_kind, pads_otherwise
from .affine import (
    FLOAT_BITS,
    dequantize,
    fake_quantize,
    qmax,
    quantize,
)

Sizes = tuple[int, int] | int


@dataclass(frozen=True)
class IntegerLayer:
    name: str  # path of the layer, as in the plan
    kind: str  # "linear", "conv1d" or "conv2d"
    # int8 in [-qmax, qmax]; [out, in] or [out, in / groups, *kernel]
    weight: torch.Tensor = field(repr=False)
    weight_scale: torch.Tensor = field(repr=False)  # float32 [out]
    weight_bits: int
    activation_scale: torch.Tensor = field(repr=False)  # float32, one element
    activation_bits: int  # FLOAT_BITS: only the weight is quantized
    bias: torch.Tensor | None = field(repr=False)  # float32 [out]
    # Pairs of a conv2d.
    stride: Sizes = 1
    padding: Sizes = 0
    dilation: Sizes = 1
    groups: int = 1
    # Subtracted from the input before it is quantized; not part of the bias,
    # see full_bias.
    activation_offset: float = 0.0
    # Reads the weight of a layer that is still in its file; ``weight`` is then
    # on the ``meta`` device.
    read: Callable[[], torch.Tensor] | None = field(
        default=None, repr=False, compare=False
    )
    # How a runtime multiplies it on this machine, see runtimes.geometry.
    algorithm: str = "native"

    @property
    def weight_only(self) -> bool:
        """As of a :class:`LayerQuant`."""
        return self.activation_bits == FLOAT_BITS

    def loaded(self) -> "IntegerLayer":
        if self.read is None:
            return self
        return replace(self, weight=self.read(), read=None)

    def to(self, device: str | torch.device) -> "IntegerLayer":
        """Moves the layer; on the CPU the weight may stay in its file."""
        device = torch.device(device)
        if device.type == "cpu" and self.read is not None:
            return self
        layer = self.loaded()
        parts = ("weight", "weight_scale", "activation_scale", "bias")
        tensors = {part: getattr(layer, part) for part in parts}
        moved = {k: t.to(device) for k, t in tensors.items() if t is not None}
        return replace(layer, **moved)

    def float_weight(self) -> torch.Tensor:
        return dequantize(self.weight, self.weight_scale)

    def full_bias(self) -> torch.Tensor | None:
        """Returns the bias including the share of the activation offset."""
        if not self.activation_offset:
            return self.bias
        shift = offset_bias(self.float_weight(), self.activation_offset)
        return shift if self.bias is None else self.bias + shift

    def zero_point(self) -> int:
        """The integer of an input of 0; raises if the offset has none."""
        if not self.activation_offset:
            return 0
        steps = self.activation_offset / float(self.activation_scale)
        zero = -round(steps)
        whole = abs(steps + zero) < 1e-3
        padded = self.padding not in (0, (0, 0))
        if not whole or abs(zero) > qmax(self.activation_bits) or padded:
            raise ValueError(
                f"{self.name}: an activation offset of "
                f"{self.activation_offset:g} can only be executed if it is a "
                f"whole multiple of {float(self.activation_scale):g} within "
                "the range and the layer has no padding; use backend: torch"
            )
        return zero


@dataclass(frozen=True)
class FloatLayer:
    """A layer that stays float; fields as in :class:`IntegerLayer`."""

    name: str
    kind: str
    weight: torch.Tensor = field(repr=False)
    bias: torch.Tensor | None = field(repr=False)
    stride: Sizes = 1
    padding: Sizes = 0
    dilation: Sizes = 1
    groups: int = 1
    algorithm: str = "native"

    def loaded(self) -> "FloatLayer":
        return self

    def full_bias(self) -> torch.Tensor | None:
        return self.bias


AnyLayer = IntegerLayer | FloatLayer


def in_integers(
    layers: Mapping[str, IntegerLayer],
) -> dict[str, IntegerLayer]:
    """Layers that are multiplied in integers: not those whose weight alone is
    quantized, whose modules have it as a float parameter."""
    return {n: layer for n, layer in layers.items() if not layer.weight_only}


def layer_geometry(module: nn.Module) -> dict[str, Sizes]:
    """Stride, padding, dilation and groups; empty for a Linear."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return {}
    if pads_otherwise(module):
        raise ValueError(
            f"a {type(module).__name__} with padding {module.padding!r}, mode "
            f"{module.padding_mode!r} has no integer form; put it in "
            "quantize.exclude"
        )
    keys = ("stride", "padding", "dilation")
    sizes = {key: tuple(getattr(module, key)) for key in keys}
    if isinstance(module, nn.Conv1d):
        sizes = {key: size for key, (size,) in sizes.items()}
    return {**sizes, "groups": module.groups}


def float_layer(name: str, module: nn.Module) -> FloatLayer:
    kind, weight = layer_kind(module), module.weight.detach().float()
    bias = None if module.bias is None else module.bias.detach().float()
    return FloatLayer(name, kind, weight, bias, **layer_geometry(module))


def multiply(
    layer: nn.Module | AnyLayer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs a layer, a module or its data, with another weight and bias."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.Module):
        # Knows its padding mode.
        return layer._conv_forward(x, weight, bias)
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    conv = F.conv1d if weight.dim() == 3 else F.conv2d
    return conv(x, weight, bias, *geometry)


def simulate(
    layer: nn.Module | IntegerLayer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    bits: int,
    offset: float = 0.0,
) -> torch.Tensor:
    """Computes on the quantization grid; ``bias`` has the offset's share."""
    x = x.float() - offset if offset else x.float()
    if bits != FLOAT_BITS:
        x = fake_quantize(x, scale, bits)
    return multiply(layer, x, weight, bias)


def integer_product(layer: IntegerLayer, q: torch.Tensor) -> torch.Tensor:
    """Multiplies int8 by int8 into int32, exactly, with plain torch."""
    # float64 holds every such sum exactly (below 2^53) and has fast products.
    out = multiply(layer, q.double(), layer.weight.double())
    return out.round_().to(torch.int32)


def reference_forward(layer: IntegerLayer, x: torch.Tensor) -> torch.Tensor:
    """Computes a layer in integer arithmetic; returns float32."""
    if layer.activation_offset:
        x = x - layer.activation_offset
    q = quantize(x, layer.activation_scale, layer.activation_bits)
    shape = (-1, *(1,) * (layer.weight.dim() - 2))
    scale = layer.activation_scale * layer.weight_scale
    out = integer_product(layer, q).float() * scale.view(shape)
    bias = layer.full_bias()
    return out if bias is None else out + bias.view(shape)


def offset_bias(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """Returns what an activation offset adds to a bias: float32 [out]."""
    return weight.flatten(1).sum(1).float() * offset


def check_offset(module: nn.Module) -> None:
    """Raises for zero padding, where an activation offset is not exact."""
    if layer_kind(module) != "linear" and set(module.padding) != {0}:
        raise ValueError(
            f"{type(module).__name__} with padding {module.padding}: an "
            "activation offset is not exact where zeros are padded"
        )
