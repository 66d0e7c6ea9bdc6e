"""Weights on the quantization grid: a scale for each output channel, or for
each group of a channel's inputs."""

import torch

from .affine import dequantize, quantize, scale_from_amax
from .calibrators import weight_amax


def weight_scale(
    weight: torch.Tensor, bits: int, method: str, group: int = 0
) -> torch.Tensor:
    """Scales of a weight.

    Arguments
    ---------
    weight : torch.Tensor
        Output channels first.
    bits : int
        2 to 8.
    method : str
        ``"max"`` or ``"mse"``.
    group : int
        0: one scale per output channel. Else so many neighboring inputs of
        a Linear share one.

    Returns
    -------
    torch.Tensor
        float32 [out], or [out, in / group].

    Raises
    ------
    ValueError
        A group that does not divide the inputs of a Linear.

    Example
    -------
    >>> weight_scale(torch.tensor([[7.0, 1.0, 14.0, 1.0]]), 4, "max", 2)
    tensor([[1., 2.]])
    """
    weight = weight.detach().float()
    if not group:
        return scale_from_amax(weight_amax(weight, bits, method), bits)
    if weight.dim() != 2 or weight.shape[1] % group:
        raise ValueError(
            f"a weight of shape {list(weight.shape)} has no groups of {group} "
            "inputs"
        )
    rows = weight.reshape(-1, group)
    scale = scale_from_amax(weight_amax(rows, bits, method), bits)
    return scale.view(weight.shape[0], -1)


def round_weight(
    weight: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """The nearest integers of a weight.

    Arguments
    ---------
    weight : torch.Tensor
        Output channels first.
    scale : torch.Tensor
        From :func:`weight_scale`.
    bits : int
        2 to 8.

    Returns
    -------
    torch.Tensor
        int8, the shape of ``weight``.

    Example
    -------
    >>> round_weight(torch.tensor([[7.0, 1.0, 14.0, 1.0]]),
    ...     torch.tensor([[1.0, 2.0]]), 4)
    tensor([[7, 1, 7, 0]], dtype=torch.int8)
    """
    weight = weight.detach().float()
    if scale.dim() == 1:
        return quantize(weight, scale, bits, axis=0)
    rows = weight.reshape(scale.numel(), -1)
    q = quantize(rows, scale.reshape(-1), bits, axis=0)
    return q.view(weight.shape)


def restore_weight(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float weight that integers stand for.

    Arguments
    ---------
    q : torch.Tensor
        int8, output channels first.
    scale : torch.Tensor
        float32 [out] or [out, groups].

    Returns
    -------
    torch.Tensor
        float32, the shape of ``q``.

    Example
    -------
    >>> restore_weight(torch.tensor([[7, 1, 7, 0]]), torch.tensor([[1.0, 2]]))
    tensor([[ 7.,  1., 14.,  0.]])
    """
    if scale.dim() == 1:
        return dequantize(q, scale, axis=0)
    rows = q.reshape(scale.numel(), -1)
    return dequantize(rows, scale.reshape(-1), axis=0).view(q.shape)
