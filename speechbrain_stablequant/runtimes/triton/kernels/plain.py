"""What the operators compute after their product, in plain torch."""

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
    """Normalizes, activates, adds, and rounds to the dtype of the result.

    Arguments
    ---------
    y : torch.Tensor
        float32 [..., channels].
    gelu : bool
        Whether GELU is applied.
    dtype : torch.dtype
        Of the result; int8 means that it is quantized.
    inverse : float
        1 / scale of the quantized result.
    limit : int
        Its largest integer.
    norm : tuple or None
        Weight, bias and eps of a LayerNorm over the channels.
    residual : torch.Tensor or None
        Added last, the shape of ``y``.
    zero : int
        The integer that a result of 0 becomes.

    Returns
    -------
    torch.Tensor
        The shape of ``y``.

    Example
    -------
    >>> finish(torch.tensor([0.3, 9.0]), False, torch.int8, 10.0, 31)
    tensor([ 3, 31], dtype=torch.int8)
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
    """Integer sums to float: ``total * scale + bias``.

    Arguments
    ---------
    total : torch.Tensor
        Exact sums [..., channels], any dtype.
    scale : torch.Tensor
        float32, broadcasts against ``total``.
    bias : torch.Tensor or None
        float32, the shape of ``scale``.

    Returns
    -------
    torch.Tensor
        float32.
    """
    y = total.float() * scale
    return y if bias is None else y + bias
