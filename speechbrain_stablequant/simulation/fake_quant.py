"""Simulated quantization: the float model computes as the plan says.

Each layer's ``forward`` is shadowed on the instance. Parameters, state dict,
hooks and parametrizations stay, so that checkpoints load and save meanwhile.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..core.affine import fake_quantize, scale_from_amax
from ..core.integer_layer import check_offset, offset_bias, simulate
from ..core.layer_quant import LayerQuant, LayerTensors
from ..core.weights import restore_weight, weight_scale
from ..model.layers import Layer
from ..utils.patching import shadowed
from ..utils.precision import plain_float32

_NOTHING = LayerTensors()


def quantize_weight(
    weight: torch.Tensor, bits: int, method: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the fake-quantized weight and its float32 scales."""
    weight = weight.detach().float()
    scale = weight_scale(weight, bits, method)
    return fake_quantize(weight, scale, bits, axis=0), scale


def _input_scale(quant: LayerQuant, device: torch.device) -> torch.Tensor:
    amax = torch.tensor(quant.activation_amax)
    return scale_from_amax(amax, quant.activation_bits).to(device)


def quantize_input(x: torch.Tensor, quant: LayerQuant) -> torch.Tensor:
    """Returns a layer's float32 input on its quantization grid."""
    scale = _input_scale(quant, x.device)
    if not quant.activation_offset:
        return fake_quantize(x, scale, quant.activation_bits)
    offset = quant.activation_offset
    return fake_quantize(x - offset, scale, quant.activation_bits) + offset


def quantized_forward(
    module: nn.Module,
    quant: LayerQuant,
    weight: torch.Tensor,
    new_bias: torch.Tensor | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the simulated forward of a Linear or Conv1d, whose output has the
    input's dtype."""
    scale = _input_scale(quant, weight.device)
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
        # By layer: what the weight was made from, and the weight.
        self._kept: dict[str, tuple] = {}

    def _weight(
        self, name: str, quant: LayerQuant, tensors: LayerTensors
    ) -> torch.Tensor:
        """Returns the layer's weight on the grid."""
        own, integers = self.layers[name].module.weight, tensors.weight
        rounding = None
        if integers is None:
            rounding = quant.weight_bits, quant.weight_method
        kept = self._kept.get(name)
        if kept and kept[0] is integers and kept[1] == rounding:
            return kept[2]
        if rounding:
            weight, _ = quantize_weight(own, *rounding)
        else:
            scale = tensors.weight_scale.to(own.device)
            weight = restore_weight(integers.to(own.device), scale)
        self._kept[name] = (integers, rounding, weight)
        return weight

    @contextmanager
    def apply(self, quants: Mapping[str, LayerQuant]) -> Iterator[None]:
        """Context in which the named layers compute quantized; others stay
        float."""
        with ExitStack() as stack:
            for name, quant in quants.items():
                module = self.layers[name].module
                tensors = self.tensors.get(name, _NOTHING)
                weight = self._weight(name, quant, tensors)
                forward = quantized_forward(module, quant, weight, tensors.bias)
                stack.enter_context(shadowed(module, "forward", forward))
            yield
