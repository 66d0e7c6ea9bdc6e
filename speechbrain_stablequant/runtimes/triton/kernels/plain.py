"""Epilogue of the operators in plain torch: what follows their product."""

import torch
from torch.nn import functional as F


def finish(
    y: torch.Tensor,
    gelu: bool,
    dtype: torch.dtype,
    inverse: float,
    limit: int,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
    zero: int = 0,
) -> torch.Tensor:
    """LayerNorm, GELU, residual, then quantizes or rounds to ``dtype``.

    ``y`` is float32 [..., channels], ``norm`` is weight, bias and eps; the rest
    as in the package's docstring.
    """
    if norm is not None:
        weight, bias, eps = norm
        y = F.layer_norm(y, weight.shape, weight, bias, eps)
    if gelu:
        y = F.gelu(y)
    if residual is not None:
        y = y + residual.float()
    if dtype != torch.int8:
        return y.to(dtype)
    q = torch.round(y * inverse + zero)
    return q.clamp_(-limit, limit).to(torch.int8)


def scaled(
    total: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Exact sums [..., channels] to float32: ``total * scale + bias``."""
    y = total.float() * scale
    return y if bias is None else y + bias
