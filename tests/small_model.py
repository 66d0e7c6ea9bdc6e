"""A small model with each kind of layer, outside of any encoder."""

import torch
from torch import nn

from speechbrain_stablequant.core.integer_layer import IntegerLayer
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import LayerPlan, QuantizationPlan
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.model.layer import Layer
from speechbrain_stablequant.model.layers import find_layers

#: Few bits, which every CPU multiplies exactly.
QUANT = LayerQuant(6, 8, 2.0)


class Small(nn.Module):
    """Features [batch, time, 16] in, [batch, time, 5] out."""

    def __init__(self):
        super().__init__()
        self.plane = nn.Conv2d(1, 4, (3, 3), stride=(1, 2), padding=(1, 0))
        self.mix = nn.Conv1d(28, 32, 3, padding=1)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plane(x[:, None]).transpose(2, 3).flatten(1, 2)
        x = self.mix(x).transpose(1, 2)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x)


def small_model() -> tuple[Small, list[Layer], dict[str, IntegerLayer]]:
    """The model, its layers and their integers."""
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        for parameter in model.attention.parameters():
            parameter.add_(0.05)  # its biases begin as 0
    layers = find_layers({"m": model}, ["m"])
    integers = {layer.name: integer_layer(layer, QUANT) for layer in layers}
    return model, layers, integers


def plan_of(layers: list[Layer], quant: LayerQuant = QUANT) -> QuantizationPlan:
    """A plan that quantizes layers."""
    rows = [
        LayerPlan(x.name, x.unit, x.kind, quant, 3.0, 100.0, "a test")
        for x in layers
    ]
    return QuantizationPlan("max", 6, 8, "0" * 32, {}, {}, [], rows)
