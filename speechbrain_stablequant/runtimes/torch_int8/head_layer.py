"""One Linear or Conv1d outside of the encoder."""

import functools

import torch
from torch.nn import functional as F

from ...core.integer_layer import IntegerLayer
from ..base import LayerExecutor
from .conv import make_conv
from .linear import FEW, FewRows, has_few_rows, make_linear, padded_rows


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
    # Packed by the first step of a decoder: other layers need one copy.
    few = functools.cache(lambda: FewRows(layer))
    most = FEW if has_few_rows(layer) else 0

    @torch.no_grad()
    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= most:
            out = few()(rows)
        else:
            more = padded_rows(len(rows)) - len(rows)
            padded = F.pad(rows, (0, 0, 0, more))
            out = linear(linear.form.prepare(padded), dtype)[: len(rows)]
        return out.view(*x.shape[:-1], out.shape[-1])

    return forward
