"""One Linear or Conv1d outside of the encoder."""

import torch

from ...core.integer_layer import IntegerLayer
from ..base import LayerExecutor
from .conv import make_conv
from .linear import make_linear


def make_layer(layer: IntegerLayer) -> LayerExecutor:
    """The integer forward of one layer, see :class:`..base.LayerExecutor`."""
    dtype = torch.float32
    if layer.kind == "conv1d":
        conv = make_conv(layer, dtype)

        @torch.no_grad()
        def forward(x: torch.Tensor) -> torch.Tensor:
            out = conv(conv.form.prepare(x.transpose(1, 2)), dtype)
            return out.transpose(1, 2)

        return forward
    linear = make_linear(layer, dtype)
    outputs = layer.weight.shape[0]

    @torch.no_grad()
    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = linear.form.prepare(x.reshape(-1, x.shape[-1]))
        return linear(rows, dtype).view(*x.shape[:-1], outputs)

    return forward
