"""Weights on the quantization grid: a scale for each output channel, or for
each group of a channel's inputs."""

import torch

from .affine import dequantize, quantize, scale_from_amax
from .calibrators import weight_amax


def weight_scale(
    weight: torch.Tensor, bits: int, method: str, group: int = 0
) -> torch.Tensor:
    """Returns float32 scales, [out], or [out, in / group] for a Linear with
    groups."""
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
    """Rounds a weight to its nearest integers, int8."""
    weight = weight.detach().float()
    if scale.dim() == 1:
        return quantize(weight, scale, bits, axis=0)
    rows = weight.reshape(scale.numel(), -1)
    q = quantize(rows, scale.reshape(-1), bits, axis=0)
    return q.view(weight.shape)


def restore_weight(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the float32 weight that integers and their scales represent."""
    if scale.dim() == 1:
        return dequantize(q, scale, axis=0)
    rows = q.reshape(scale.numel(), -1)
    return dequantize(rows, scale.reshape(-1), axis=0).view(q.shape)
