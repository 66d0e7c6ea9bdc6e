"""Simulated quantization: the float model computes as the plan says.

Each layer's ``forward`` is shadowed on the instance. Parameters, state dict,
hooks and parametrizations stay, so that checkpoints load and save meanwhile.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..core.affine import dequantize, fake_quantize, weight_scale
from ..core.integer_layer import check_offset, offset_bias, simulate
from ..core.layer_quant import LayerQuant, LayerTensors
from ..model.layer import Layer
from ..model.layers import visible_layers
from ..utils.patching import shadowed_forwards
from ..utils.precision import plain_float32

Forward = Callable[[torch.Tensor], torch.Tensor]

_NOTHING = LayerTensors()


def quantize_input(x: torch.Tensor, quant: LayerQuant) -> torch.Tensor:
    if quant.weight_only:
        return x
    scale = quant.input_scale(x.device)
    if not quant.activation_offset:
        return fake_quantize(x, scale, quant.activation_bits)
    offset = quant.activation_offset
    return fake_quantize(x - offset, scale, quant.activation_bits) + offset


def quantized_forward(
    module: nn.Module,
    quant: LayerQuant,
    weight: torch.Tensor,
    new_bias: torch.Tensor | None = None,
) -> Forward:
    """The simulated forward of a layer's module."""
    scale = quant.input_scale(weight.device)
    offset, shift = quant.activation_offset, None
    if offset:
        check_offset(module)
        shift = offset_bias(weight, offset)
    if new_bias is not None:
        new_bias = new_bias.to(weight.device)

    def forward(x: torch.Tensor) -> torch.Tensor:
        bias = module.bias if new_bias is None else new_bias
        bias = None if bias is None else bias.float()
        if shift is not None:
            bias = shift if bias is None else bias + shift
        # A 16-bit product of grid values would round them a second time, and
        # so would TF32.
        with plain_float32(x):
            bits = quant.activation_bits
            out = simulate(module, x, weight, bias, scale, bits, offset)
        return out.to(x.dtype)

    return forward


class _Kept(NamedTuple):
    """What a layer last computed with, and what it was made from."""

    quant: LayerQuant
    tensors: LayerTensors
    weight: torch.Tensor
    forward: Forward

    def same_weight(self, quant: LayerQuant, tensors: LayerTensors) -> bool:
        """Whether the weight also serves another quantization."""
        rounding = quant.weight_bits, quant.weight_method
        own = self.quant.weight_bits, self.quant.weight_method
        same = tensors.weight is self.tensors.weight
        return same and (tensors.weight is not None or rounding == own)


class Simulator:
    """Applies quantization to the layers of one model, repeatedly.

    The last weight of each layer is kept, since a search returns to it: one
    float32 copy of the model. ``tensors`` hold integers and biases that replace
    the nearest ones; the attribute may be changed between two contexts.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        tensors: Mapping[str, LayerTensors] | None = None,
    ):
        self.layers = {layer.name: layer for layer in layers}
        self.tensors = dict(tensors or {})
        self._kept: dict[str, _Kept] = {}

    def reset(self) -> None:
        """Drops what was made of another form of the model."""
        self.tensors, self._kept = {}, {}

    def _forward(self, name: str, quant: LayerQuant) -> Forward:
        tensors = self.tensors.get(name, _NOTHING)
        kept = self._kept.get(name)
        if kept and kept.quant == quant and kept.tensors is tensors:
            return kept.forward
        module = self.layers[name].module
        if kept and kept.same_weight(quant, tensors):
            weight = kept.weight
        elif tensors.weight is None:
            own, bits = module.weight.detach().float(), quant.weight_bits
            scale = weight_scale(own, bits, quant.weight_method)
            weight = fake_quantize(own, scale, bits)
        else:
            device = module.weight.device
            scale = tensors.weight_scale.to(device)
            weight = dequantize(tensors.weight.to(device), scale)
        forward = quantized_forward(module, quant, weight, tensors.bias)
        self._kept[name] = _Kept(quant, tensors, weight, forward)
        return forward

    @contextmanager
    def apply(self, quants: Mapping[str, LayerQuant]) -> Iterator[None]:
        """Context in which the named layers compute quantized."""
        forwards = {
            self.layers[name].module: self._forward(name, quant)
            for name, quant in quants.items()
        }
        layers = [self.layers[name] for name in quants]
        with visible_layers(layers), shadowed_forwards(forwards):
            yield
