"""Layer by layer with fake quantization: any device, any bit width, slow."""

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

    def operands() -> dict[str, torch.Tensor | None]:
        there = layer.loaded()
        return {
            "weight": there.float_weight(),
            "scale": there.activation_scale,
            "bias": there.full_bias(),
        }

    kept = operands() if keep else {}

    def forward(x: torch.Tensor) -> torch.Tensor:
        held = kept or operands()
        # Kept where the input is: the model may move after this.
        if held["weight"].device != x.device:
            for key, value in held.items():
                held[key] = None if value is None else value.to(x.device)
        arrays = (held["weight"], held["bias"], held["scale"])
        grid = (layer.activation_bits, layer.activation_offset)
        return simulate(layer, x, *arrays, *grid).to(x.dtype)

    return forward


def simulated_forwards(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> dict[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Simulated forwards by module, which hold one float weight at a time."""
    forwards = {n: make_layer(x, keep=False) for n, x in integers.items()}
    return layer_forwards(modules, forwards)
