"""One Linear or Conv1d outside of the encoder."""

import torch

from ...core.integer_layer import IntegerLayer
from ..base import LayerExecutor
from .conv import make_conv
from .linear import make_linear


def make_layer(layer: IntegerLayer) -> LayerExecutor:
    """The integer forward of one layer.

    Arguments
    ---------
    layer : IntegerLayer
        The layer.

    Returns
    -------
    callable
        float [..., in] of a Linear, [batch, in, time] of a Conv1d, giving
        float32.

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
