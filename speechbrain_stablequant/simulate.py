"""Simulated quantization: the float model computes as the plan says, and is
itself again afterwards.

Each layer's ``forward`` is shadowed on the instance. Parameters, state dict,
hooks and parametrizations stay as they are, so that checkpoints of the float
model load and save while a simulation is on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from .calibrators import weight_amax
from .layers import Layer
from .numerics import fake_quantize, scale_from_amax
from .plan import LayerQuant


def quantize_weight(
    weight: torch.Tensor, bits: int, method: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fake-quantized weight and its scales.

    Arguments
    ---------
    weight : torch.Tensor
        Float weight, output channels first.
    bits : int
        2 to 8.
    method : str
        ``"max"`` or ``"mse"``.

    Returns
    -------
    torch.Tensor
        Weight of the same shape, on the quantization grid.
    torch.Tensor
        float32 scales, one per output channel.

    Example
    -------
    >>> weight, scale = quantize_weight(torch.tensor([[1.0, 0.4]]), 2, "max")
    >>> weight, scale
    (tensor([[1., 0.]]), tensor([1.]))
    """
    weight = weight.detach().float()
    scale = scale_from_amax(weight_amax(weight, bits, method), bits)
    return fake_quantize(weight, scale, bits, axis=0), scale


def quantized_forward(
    module: nn.Module, quant: LayerQuant, weight: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a layer under simulation.

    Arguments
    ---------
    module : torch.nn.Module
        A Linear or Conv1d, parametrized or not.
    quant : LayerQuant
        How its input is quantized.
    weight : torch.Tensor
        Its weight on the quantization grid.

    Returns
    -------
    callable
        Of the input, giving the output in the input's dtype.
    """
    bits = quant.activation_bits
    scale = scale_from_amax(torch.tensor(quant.activation_amax), bits)
    scale = scale.to(weight.device)
    is_conv = isinstance(module, nn.Conv1d)

    def forward(x: torch.Tensor) -> torch.Tensor:
        # A 16-bit product of grid values would round them a second time.
        with torch.autocast(x.device.type, enabled=False):
            grid = fake_quantize(x.float(), scale, bits)
            bias = None if module.bias is None else module.bias.float()
            if is_conv:
                # Zero padding stays exact: the zero point is 0.
                out = module._conv_forward(grid, weight, bias)
            else:
                out = F.linear(grid, weight, bias)
        return out.to(x.dtype)

    return forward


class Simulator:
    """Applies quantization to the layers of one model, again and again.

    Fake-quantized weights are kept, since a search returns to the same ones.

    Arguments
    ---------
    layers : iterable of Layer
        All layers that may be quantized.

    Example
    -------
    >>> linear = nn.Linear(2, 1, bias=False)
    >>> linear.weight.data = torch.tensor([[1.0, -1.0]])
    >>> layer = Layer("enc", linear, "linear", "head")
    >>> with Simulator([layer]).apply({"enc": LayerQuant(2, 2, 1.0)}):
    ...     linear(torch.tensor([0.6, 7.0])).tolist()
    [0.0]
    """

    def __init__(self, layers: Iterable[Layer]):
        self.layers = {layer.name: layer for layer in layers}
        self._weights: dict[tuple[str, int, str], torch.Tensor] = {}

    def _weight(self, name: str, quant: LayerQuant) -> torch.Tensor:
        key = (name, quant.weight_bits, quant.weight_method)
        if key not in self._weights:
            module = self.layers[name].module
            self._weights[key], _ = quantize_weight(
                module.weight, quant.weight_bits, quant.weight_method
            )
        return self._weights[key]

    @contextmanager
    def apply(self, quants: Mapping[str, LayerQuant]) -> Iterator[None]:
        """Context in which the named layers compute quantized.

        Arguments
        ---------
        quants : Mapping
            LayerQuant by layer name; layers that are not named stay float.

        Raises
        ------
        KeyError
            A name that is no layer of this model.
        """
        shadowed = []
        try:
            for name, quant in quants.items():
                module = self.layers[name].module
                if "forward" in vars(module):
                    raise RuntimeError(f"{name}: is being simulated already")
                forward = quantized_forward(
                    module, quant, self._weight(name, quant)
                )
                module.forward = forward
                shadowed.append(module)
            yield
        finally:
            for module in shadowed:
                del module.forward
