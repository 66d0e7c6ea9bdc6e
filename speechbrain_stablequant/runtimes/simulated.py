"""Layer by layer with fake quantization: any device, any bit width, slow.

The float model's own forward stays; each layer computes as
:mod:`speechbrain_stablequant.simulation.fake_quant` does, from its integers.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from ..core.affine import fake_quantize
from ..core.integer_layer import IntegerLayer
from .base import modules_by_name


def make_layer(
    layer: IntegerLayer, keep: bool = True
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The simulated forward of one layer.

    Arguments
    ---------
    layer : IntegerLayer
        The layer.
    keep : bool
        Whether its weight stays in memory as floats. Otherwise each call
        makes them, so that there is one weight at a time.

    Returns
    -------
    callable
        Of the input, giving the output in the input's dtype.

    Example
    -------
    >>> from speechbrain_stablequant.core.plan import LayerQuant
    >>> from speechbrain_stablequant.model.layers import Layer
    >>> from speechbrain_stablequant.core.integer_layer import integer_layer
    >>> linear = torch.nn.Linear(2, 1, bias=False)
    >>> linear.weight.data = torch.tensor([[1.0, -1.0]])
    >>> layer = Layer("enc", linear, "linear", "head")
    >>> forward = make_layer(integer_layer(layer, LayerQuant(2, 2, 1.0)))
    >>> forward(torch.tensor([0.6, 7.0])).tolist()
    [0.0]
    """

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
        weight, bias = held["weight"], held["bias"]
        x32 = x.float()
        if layer.activation_offset:
            x32 = x32 - layer.activation_offset
        grid = fake_quantize(x32, held["scale"], layer.activation_bits)
        if layer.kind == "linear":
            out = F.linear(grid, weight, bias)
        else:
            out = F.conv1d(
                grid,
                weight,
                bias,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
            )
        return out.to(x.dtype)

    return forward


def simulated_forwards(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> dict[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Forwards of a simulation that holds one float weight at a time.

    Arguments
    ---------
    modules : Mapping
        Modules by key.
    integers : Mapping
        Integer layers by name.

    Returns
    -------
    dict
        Forward by module.
    """
    by_name = modules_by_name(modules, integers)
    return {
        by_name[name]: make_layer(layer, keep=False)
        for name, layer in integers.items()
    }
