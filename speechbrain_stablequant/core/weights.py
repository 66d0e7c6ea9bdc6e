"""Weights on the quantization grid, one scale for each output channel."""

import torch

from .affine import MIN_AMAX, dequantize, qmax, quantize, scale_from_amax

# Values searched at once. On a CPU a chunk and its error stay in the cache;
# on a GPU few large chunks mean few kernel launches.
_CHUNK_CPU = 1 << 17
_CHUNK_GPU = 1 << 24

# Candidates of the search, and of its refinement.
_GRID = 100
_REFINE = 10


def weight_scale(weight: torch.Tensor, bits: int, method: str) -> torch.Tensor:
    """Returns float32 scales [out], see :func:`weight_amax`."""
    return scale_from_amax(weight_amax(weight, bits, method), bits)


def round_weight(
    weight: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """Rounds a weight to its nearest integers, int8."""
    return quantize(weight.detach(), scale, bits, axis=0)


def restore_weight(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the float32 weight that integers and their scales represent."""
    return dequantize(q, scale, axis=0)


@torch.no_grad()
def weight_amax(weight: torch.Tensor, bits: int, method: str) -> torch.Tensor:
    """Returns the float32 amax of each output channel, by ``"max"`` or
    ``"mse"``.

    ``mse`` tries 100 fractions of the channel's maximum on the raw values and
    refines around the best, so it is never worse than ``max``.
    """
    limit = qmax(bits)
    rows = weight.detach().to(torch.float32).flatten(1)
    amax = rows.abs().amax(1)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("a weight holds NaN or Inf; load another checkpoint")
    amax = amax.clamp(min=MIN_AMAX)
    if method == "max":
        return amax
    chunk = _CHUNK_CPU if rows.device.type == "cpu" else _CHUNK_GPU
    step = max(1, chunk // rows.shape[1])
    parts = zip(rows.split(step), amax.split(step), strict=True)
    return torch.cat(
        [_search_channels(part.abs(), top, limit) for part, top in parts]
    )


def _search_channels(
    rows: torch.Tensor, top: torch.Tensor, limit: int
) -> torch.Tensor:
    """Returns the best amax of each row of magnitudes; `top` is its max."""
    work = torch.empty_like(rows)

    def better(amax, best, least):
        amax = amax.clamp(min=MIN_AMAX).minimum(top)
        error = _row_errors(rows, amax, limit, work)
        return torch.where(error < least, amax, best), error.minimum(least)

    best, least = top, _row_errors(rows, top, limit, work)
    for i in range(1, _GRID):
        best, least = better(top * (i / _GRID), best, least)
    center, spacing = best, top / (_GRID * _REFINE)
    for i in range(1 - _REFINE, _REFINE):
        best, least = better(center + i * spacing, best, least)
    return best


def _row_errors(
    rows: torch.Tensor, amax: torch.Tensor, limit: int, work: torch.Tensor
) -> torch.Tensor:
    """Returns the root of the squared error of each row; `work` is scratch."""
    scale = (amax / limit)[:, None]
    torch.mul(rows, 1.0 / scale, out=work)
    work.round_().clamp_(max=limit).mul_(scale).sub_(rows)
    return torch.linalg.vector_norm(work, dim=1)
