"""Simulated quantization: the float model computes as the plan says.

Each layer's ``forward`` is shadowed on the instance. Parameters, state dict,
hooks and parametrizations stay, so that checkpoints load and save meanwhile.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..core.affine import fake_quantize, scale_from_amax
from ..core.integer_layer import check_offset, offset_bias
from ..core.plan import LayerQuant
from ..core.plan_tensors import LayerTensors
from ..core.weights import restore_weight, weight_scale
from ..model.layers import Layer
from ..utils.precision import plain_float32

_NOTHING = LayerTensors()


def quantize_weight(
    weight: torch.Tensor, bits: int, method: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the fake-quantized weight and its float32 scales."""
    weight = weight.detach().float()
    scale = weight_scale(weight, bits, method)
    return fake_quantize(weight, scale, bits, axis=0), scale


def quantize_input(x: torch.Tensor, quant: LayerQuant) -> torch.Tensor:
    """Returns a layer's float32 input on its quantization grid."""
    bits = quant.activation_bits
    scale = scale_from_amax(torch.tensor(quant.activation_amax), bits)
    scale = scale.to(x.device)
    if not quant.activation_offset:
        return fake_quantize(x, scale, bits)
    offset = quant.activation_offset
    return fake_quantize(x - offset, scale, bits) + offset


def multiply(
    module: nn.Module,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Runs a Linear or Conv1d with another weight and bias."""
    if isinstance(module, nn.Conv1d):
        # Zero padding stays exact: the zero point is 0.
        return module._conv_forward(x, weight, bias)
    return F.linear(x, weight, bias)


def quantized_forward(
    module: nn.Module,
    quant: LayerQuant,
    weight: torch.Tensor,
    new_bias: torch.Tensor | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the simulated forward of a Linear or Conv1d, whose output has the
    input's dtype."""
    bits = quant.activation_bits
    scale = scale_from_amax(torch.tensor(quant.activation_amax), bits)
    scale = scale.to(weight.device)
    offset, shift = quant.activation_offset, None
    if offset:
        check_offset(module)
        shift = offset_bias(weight, offset)
    if new_bias is not None:
        new_bias = new_bias.to(weight.device)

    def forward(x: torch.Tensor) -> torch.Tensor:
        # A 16-bit product of grid values would round them a second time, and
        # so would TF32.
        with plain_float32(x):
            bias = module.bias if new_bias is None else new_bias
            bias = None if bias is None else bias.float()
            if shift is None:
                grid = fake_quantize(x.float(), scale, bits)
            else:
                grid = fake_quantize(x.float() - offset, scale, bits)
                bias = shift if bias is None else bias + shift
            out = multiply(module, grid, weight, bias)
        return out.to(x.dtype)

    return forward


@dataclass(frozen=True)
class _Kept:
    """What a layer last computed with, and what it was made from."""

    quant: LayerQuant
    tensors: LayerTensors
    weight: torch.Tensor
    forward: Callable[[torch.Tensor], torch.Tensor]

    def same_weight(self, quant: LayerQuant, tensors: LayerTensors) -> bool:
        """Whether the weight also serves another quantization."""
        if tensors.weight is not None or self.tensors.weight is not None:
            return tensors.weight is self.tensors.weight
        return all(
            getattr(quant, name) == getattr(self.quant, name)
            for name in ("weight_bits", "weight_method")
        )


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

    def _forward(
        self, name: str, quant: LayerQuant
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns the layer's simulated forward, reusing its last weight."""
        tensors = self.tensors.get(name, _NOTHING)
        kept = self._kept.get(name)
        if kept and kept.quant == quant and kept.tensors is tensors:
            return kept.forward
        module = self.layers[name].module
        if kept and kept.same_weight(quant, tensors):
            weight = kept.weight
        elif tensors.weight is not None:
            device = module.weight.device
            weight = restore_weight(
                tensors.weight.to(device), tensors.weight_scale.to(device)
            )
        else:
            weight, _ = quantize_weight(
                module.weight, quant.weight_bits, quant.weight_method
            )
        forward = quantized_forward(module, quant, weight, tensors.bias)
        self._kept[name] = _Kept(quant, tensors, weight, forward)
        return forward

    @contextmanager
    def apply(self, quants: Mapping[str, LayerQuant]) -> Iterator[None]:
        """Context in which the named layers compute quantized; others stay
        float."""
        shadowed = []
        try:
            for name, quant in quants.items():
                module = self.layers[name].module
                if "forward" in vars(module):
                    raise RuntimeError(f"{name}: is being simulated already")
                module.forward = self._forward(name, quant)
                shadowed.append(module)
            yield
        finally:
            for module in shadowed:
                del module.forward
