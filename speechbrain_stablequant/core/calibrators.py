"""Calibrators: from a histogram of magnitudes to the amax of a tensor.

A calibrator is a pure function ``fn(hist, bits, **options) -> float`` and a
line of ``CALIBRATORS``, under the name that a user writes.
"""

from collections.abc import Callable

import torch

from .affine import MIN_AMAX, qmax
from .histogram import Histogram

_KL_TIE = 1e-10  # KL divergences closer than this are ties

# Histogram bins of `entropy` and its first candidate, as in NVIDIA's procedure.
_ENTROPY_BINS = 2048
_ENTROPY_START = 128

_MSE_GRID = 256  # candidates of `mse`

_CHUNK = 1 << 17  # errors computed at once, so that they stay in the cache


def max_calibrator(hist: Histogram, bits: int) -> float:
    """Returns the largest magnitude: nothing is clipped."""
    return max(hist.max, MIN_AMAX)


def percentile_calibrator(
    hist: Histogram, bits: int, percentile: float = 99.99
) -> float:
    """Returns the magnitude below which ``percentile`` % of the values lie."""
    return max(hist.quantile(percentile / 100), MIN_AMAX)


def entropy_calibrator(hist: Histogram, bits: int) -> float:
    """Returns the amax that loses the least information (KL divergence).

    After S. Migacz, "8-bit Inference with TensorRT", GTC 2017, with the detail
    of NVIDIA's pytorch-quantization toolkit that the first bin takes the count
    of the second. For each number of bins i from 128 to all of them:

    - P is the first i bins, with the mass beyond them added to the last one;
    - Q is the first i bins without that mass, merged to ``2^(bits-1)`` levels
      and expanded evenly over the bins of a level that are not empty;
    - both are normalized, and KL(P || Q) is computed.

    The last i with the smallest divergence wins. NVIDIA uses 2048 bins over
    [0, max]; here pairs of bins are merged until fewer than 4096 are occupied.
    """
    largest = hist.max
    counts, width = _occupied_bins(hist)
    if counts.numel() > 1:
        counts[0] = counts[1]
    if counts.numel() <= _ENTROPY_START or not bool(counts.any()):
        return max(largest, MIN_AMAX)
    divergence = _kl_divergences(counts, qmax(bits) + 1)
    ties = (divergence <= divergence.min() + _KL_TIE).nonzero()
    kept = _ENTROPY_START + int(ties[-1])
    return max(min(kept * width, largest), MIN_AMAX)


def mse_calibrator(hist: Histogram, bits: int) -> float:
    """Returns the amax that minimizes E[(x - fake_quantize(x))^2].

    The error of a bin is the exact integral over a density that is flat inside
    the bin; its center would be far off where a step is hardly wider than a
    bin. The search takes a geometric grid, because with outliers the best amax
    is a small fraction of the maximum, and refines it twice on a linear grid,
    in float64.
    """
    limit, top = qmax(bits), hist.max
    if top <= MIN_AMAX:
        return MIN_AMAX
    bins = _density(hist)
    # The optimum is no finer than the bins: one amax below them is enough.
    exponents = torch.linspace(0, 1, _MSE_GRID, dtype=torch.float64)
    grid = top * hist.num_bins ** (exponents - 1)
    for _ in range(2):
        best = int(_squared_errors(grid, limit, *bins).argmin())
        low = float(grid[max(best - 1, 0)])
        high = float(grid[min(best + 1, grid.numel() - 1)])
        # grid[best] stays a candidate, so refining never makes it worse.
        grid = torch.cat(
            [torch.linspace(low, high, 33, dtype=torch.float64), grid[[best]]]
        ).sort()[0]
    best = int(_squared_errors(grid, limit, *bins).argmin())
    return max(min(float(grid[best]), top), MIN_AMAX)


#: Name -> calibrator. The names are those of the `quantize:` block.
CALIBRATORS: dict[str, Callable[..., float]] = {
    "max": max_calibrator,
    "percentile": percentile_calibrator,
    "entropy": entropy_calibrator,
    "mse": mse_calibrator,
}


def clipped_mse(histogram: Histogram, edge: float, bits: int) -> float:
    """Step 3 of StableQuant: the MSE amax of a clipped histogram."""
    return mse_calibrator(histogram.clip(edge), bits) if edge > 0 else edge


# -- entropy -----------------------------------------------------------------


def _occupied_bins(hist: Histogram) -> tuple[torch.Tensor, float]:
    """Returns int64 counts up to the last occupied bin, and the bin width."""
    counts, width = hist.counts, hist.bin_width
    used = int(counts.nonzero()[-1]) + 1
    while used >= 2 * _ENTROPY_BINS:
        counts, width = counts.view(-1, 2).sum(1), 2 * width
        used = (used + 1) // 2
    return counts[:used], width


def _kl_divergences(counts: torch.Tensor, levels: int) -> torch.Tensor:
    """Returns KL(P || Q) of every candidate number of bins.

    With p the counts of P, N their sum, and level k of Q holding the count
    S_k in Z_k bins that are not empty, each bin of it is S_k / Z_k, and M is
    the sum of Q. Then

        N KL = sum p log p - sum p log(S / Z) - N log N + N log M

    where the bins of a level add up to S_k log(S_k / Z_k), and only the last
    bin has p differ from the count. So each candidate costs `levels` terms,
    read from cumulative sums, instead of i.
    """
    zero = counts.new_zeros(1)
    mass = torch.cat([zero, counts.cumsum(0)])  # exact: int64
    filled = torch.cat([zero, (counts > 0).cumsum(0)])
    candidates = torch.arange(_ENTROPY_START, counts.numel() + 1)
    total = mass[-1].double()
    kept = mass[candidates].double()
    last = counts[candidates - 1].double()
    tail = total - kept

    # Bin j belongs to level floor(j * levels / i).
    level = torch.arange(levels + 1)
    bounds = -(-level * candidates[:, None] // levels)
    level_mass = mass[bounds].diff(dim=1).double()
    level_filled = filled[bounds].diff(dim=1).double()
    mean = level_mass / level_filled.clamp(min=1)

    plogp = torch.special.xlogy(counts.double(), counts.double()).cumsum(0)
    own = plogp[candidates - 1] - torch.special.xlogy(last, last)
    own += torch.special.xlogy(last + tail, last + tail)
    cross = torch.special.xlogy(level_mass, mean).sum(1)
    # The last bin lies in the last level that is not empty.
    last_level = (candidates - 1) * levels // candidates
    last_mean = mean.gather(1, last_level[:, None]).squeeze(1)
    cross += torch.special.xlogy(tail, last_mean)
    divergence = (own - cross) / total - total.log() + kept.log()
    # P has mass where Q has none: the divergence is infinite.
    impossible = ((last == 0) & (tail > 0)) | (kept == 0)
    return divergence.masked_fill(impossible, float("inf"))


# -- mse ---------------------------------------------------------------------


def _density(
    hist: Histogram,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left edges, right edges and counts of the occupied bins, float64."""
    counts, width = hist.counts, hist.bin_width
    index = counts.nonzero().squeeze(1)
    left = index.double() * width
    right = ((index + 1).double() * width).clamp(max=hist.max)
    # A clipped histogram may hold all of a bin's mass at its left edge.
    # A sliver of a bin is the same and needs no case of its own.
    right = torch.maximum(right, left + 1e-3 * width)
    return left, right, counts[index].double()


def _squared_errors(
    amax: torch.Tensor,
    limit: int,
    left: torch.Tensor,
    right: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """Returns the squared error of each amax, summed over the bins."""
    weights = counts / (right - left)

    def errors(scale):
        return _integral(right, scale, limit) - _integral(left, scale, limit)

    step = max(1, _CHUNK // left.numel())
    parts = (amax / limit)[:, None].split(step)
    return torch.cat([errors(scale) @ weights for scale in parts])


def _integral(x: torch.Tensor, scale: torch.Tensor, limit: int) -> torch.Tensor:
    """Integrates (t - fake_quantize(t))^2 from 0 to x >= 0.

    With n the integer of x and r = x - n * scale: a full step contributes
    scale^3 / 12, and the last one r^3 / 3. Beyond the range n stays at
    ``limit``.
    """
    n = torch.round(x / scale).clamp_(max=limit)
    r = x - n * scale
    return n * scale**3 / 12 + r**3 / 3
