"""Layer by layer with fake quantization: any device, any bit width, slow."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..core.integer_layer import IntegerLayer, simulate
from .forwards import layer_forwards


def make_layer(
    layer: IntegerLayer, keep: bool = True
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The simulated forward of one layer. Without ``keep`` each call makes
    the float weight anew, so that one exists at a time."""

    def operands(device: torch.device) -> list[torch.Tensor | None]:
        there = layer.loaded()
        bias, scale = there.full_bias(), there.activation_scale
        found = there.float_weight(), bias, scale
        return [x if x is None else x.to(device) for x in found]

    if keep:
        # One copy, where the input is: the model may move after this.
        operands = functools.lru_cache(1)(operands)

    def forward(x: torch.Tensor) -> torch.Tensor:
        grid = (layer.activation_bits, layer.activation_offset)
        return simulate(layer, x, *operands(x.device), *grid).to(x.dtype)

    return forward


def simulated_forwards(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> dict[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Simulated forwards by module, which hold one float weight at a time."""
    forwards = {n: make_layer(x, keep=False) for n, x in integers.items()}
    return layer_forwards(modules, forwards)
