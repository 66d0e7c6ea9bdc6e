"""Weights on the quantization grid, one scale for each output channel."""

import torch

from .affine import dequantize, quantize, scale_from_amax
from .calibrators import weight_amax


def weight_scale(weight: torch.Tensor, bits: int, method: str) -> torch.Tensor:
    """Returns float32 scales [out]."""
    amax = weight_amax(weight.detach().float(), bits, method)
    return scale_from_amax(amax, bits)


def round_weight(
    weight: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """Rounds a weight to its nearest integers, int8."""
    return quantize(weight.detach(), scale, bits, axis=0)


def restore_weight(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the float32 weight that integers and their scales represent."""
    return dequantize(q, scale, axis=0)
