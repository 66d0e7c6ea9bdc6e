"""A histogram of magnitudes that does not depend on the order of the data.

Its range is a power of two and grows by merging pairs of bins. So any order,
any batching and any split over processes (``merge``) give the same integers.
Counts are int64: float32 counts (``torch.histc``) stop growing at 2^24, which
one utterance of 16 s exceeds at the first convolution.
"""

import math
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from ..utils.typed import typed

# Values below 2^-64 share the first bin; it also bounds the factor below,
# which has to be a float32.
_MIN_EXPONENT = -64
_MAX_EXPONENT = 128  # all of float32

# Values counted at once. On a CPU a chunk and its int32 indices stay in the
# cache; on a GPU few large chunks mean few kernel launches.
_CHUNK_CPU = 1 << 18
_CHUNK_GPU = 1 << 24


@dataclass(frozen=True)
class _State:
    """A histogram in a file; the counts without zeros at the end."""

    num_bins: int
    exponent: int
    max: float
    counts: list


class Histogram:
    """Counts of ``|x|`` in a power of two of equal bins from 0.

    The range is the smallest power of two above the largest magnitude seen.
    """

    def __init__(self, num_bins: int = 4096):
        self._counts = torch.zeros(num_bins, dtype=torch.int64)
        self._exponent = _MIN_EXPONENT
        self._max = 0.0

    # -- collecting --------------------------------------------------------

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Counts the magnitudes of a tensor; raises on NaN or infinity."""
        if x.numel() == 0:
            return
        values = x.detach().to(torch.float32).reshape(-1)
        low, high = torch.stack(torch.aminmax(values)).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                "the data hold NaN or Inf; look for a broken audio file or "
                "an overflow of half precision"
            )
        largest = max(abs(low), abs(high))
        # frexp gives the smallest e with 2^e > largest, but 0 for 0.
        if largest:
            self._widen(math.frexp(largest)[1])
        self._max = max(self._max, largest)
        new = _count(values, self.num_bins, self._exponent).cpu()
        # Not in place: under torch.inference_mode the counts may have become
        # an inference tensor, which nothing outside of it may write to.
        self._counts = self._counts + new

    def merge(self, other: "Histogram") -> "Histogram":
        """Adds the counts of one with as many bins, exactly; returns self."""
        self._widen(other._exponent)
        new = _merge_bins(other._counts, self._exponent - other._exponent)
        self._counts = self._counts + new
        self._max = max(self._max, other._max)
        return self

    def _widen(self, exponent: int) -> None:
        """Grows the range to at least ``2^exponent``."""
        if exponent > self._exponent:
            self._counts = _merge_bins(self._counts, exponent - self._exponent)
            self._exponent = exponent

    # -- reading -----------------------------------------------------------

    @property
    def num_bins(self) -> int:
        return self._counts.numel()

    @property
    def counts(self) -> torch.Tensor:
        """A copy of the counts, int64 ``[num_bins]`` on the CPU."""
        return self._counts.clone()

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    @property
    def range(self) -> float:
        """Upper edge of the last bin, a power of two above `max`."""
        return math.ldexp(1.0, self._exponent)

    @property
    def bin_width(self) -> float:
        return self.range / self.num_bins

    @property
    def max(self) -> float:
        """Largest magnitude, exact. Raises ValueError if empty."""
        if not bool(self._counts.any()):
            raise ValueError(
                "no values were collected; give the calibration set at "
                "least one utterance that reaches this layer"
            )
        return self._max

    def quantile(self, p: float) -> float:
        """The magnitude below which a fraction of the values lies."""
        if not 0 < p <= 1:
            raise ValueError(f"a quantile needs 0 < p <= 1, got {p!r}")
        largest = self.max
        if p == 1:
            return largest
        cdf = self._counts.cumsum(0)
        target = p * int(cdf[-1])
        index = int(torch.searchsorted(cdf.double(), target))
        inside = int(self._counts[index])
        fraction = (target - (int(cdf[index]) - inside)) / inside
        left = index * self.bin_width
        right = max(left, min(left + self.bin_width, largest))
        return left + fraction * (right - left)

    def share_above(self, edge: float) -> float:
        """The share of the values above a magnitude; inverse of `quantile`."""
        if edge >= self.max:
            return 0.0
        index = int(edge / self.bin_width)
        left = index * self.bin_width
        right = min(left + self.bin_width, self._max)
        inside = int(self._counts[index]) * (right - edge) / (right - left)
        return (int(self._counts[index + 1 :].sum()) + inside) / self.count

    def clip(self, edge: float) -> "Histogram":
        """The histogram of the data clamped to ``edge``, exactly."""
        result = copy(self)
        if edge < self._max:
            index = int(edge / self.bin_width)
            result._counts = self.counts
            result._counts[index] = self._counts[index:].sum()
            result._counts[index + 1 :] = 0
            result._max = edge
        return result

    # -- JSON --------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, see :class:`_State`."""
        occupied = self._counts.nonzero()
        used = int(occupied[-1]) + 1 if len(occupied) else 0
        return {
            "num_bins": self.num_bins,
            "exponent": self._exponent,
            "max": self._max,
            "counts": self._counts[:used].tolist(),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Histogram":
        state = typed(state, _State, "a histogram")
        counts, used = state.counts, len(state.counts)
        possible = (
            2 <= state.num_bins <= 1 << 24
            and state.num_bins.bit_count() == 1
            and used <= state.num_bins
            and _MIN_EXPONENT <= state.exponent <= _MAX_EXPONENT
            and all(type(c) is int and c >= 0 for c in counts)
            # Sums of bins stay within int64.
            and sum(counts) < 1 << 62
        )
        if possible:
            # The maximum lies in the last bin or on its upper edge.
            width = math.ldexp(1.0, state.exponent) / state.num_bins
            possible = max(used - 1, 0) * width <= state.max <= used * width
        if not possible:
            raise ValueError(
                "a histogram's counts, max and exponent contradict each "
                "other; collect it again"
            )
        hist = cls(state.num_bins)
        hist._counts[:used] = torch.tensor(counts, dtype=torch.int64)
        hist._exponent, hist._max = state.exponent, state.max
        return hist


def _merge_bins(counts: torch.Tensor, doublings: int) -> torch.Tensor:
    """Returns the counts for a range that is `2^doublings` times as large."""
    if doublings == 0:
        return counts
    num_bins = counts.numel()
    # More doublings than bits in num_bins put everything in the first bin.
    group = min(2**doublings, num_bins)
    merged = torch.zeros_like(counts)
    merged[: num_bins // group] = counts.view(-1, group).sum(1)
    return merged


def _count(values: torch.Tensor, num_bins: int, exponent: int) -> torch.Tensor:
    """Counts float32 `values` with `|values| < 2^exponent`; int64."""
    # A power of two: the product is exact, so a bin's edge is sharp.
    factor = math.ldexp(float(num_bins), -exponent)
    chunk = _CHUNK_CPU if values.device.type == "cpu" else _CHUNK_GPU
    total = torch.zeros(num_bins, dtype=torch.int64, device=values.device)
    for part in values.split(chunk):
        index = part.abs().mul_(factor).to(torch.int32)
        total += torch.bincount(index, minlength=num_bins)
    return total
