"""A histogram of magnitudes that does not depend on the order of the data.

Calibration sees the activations of a layer batch by batch. A histogram whose
width is fixed by its first batch gives another result for another order. Here
the range is always a power of two and grows by merging pairs of bins, so the
counts are a function of the set of values alone: any order, any batching and
any split over processes (`merge`) give the same integers.

Counts are int64: float32 counts (`torch.histc`) stop growing at 2^24, which a
single 16 s utterance exceeds at the first convolution.
"""

import math
from typing import Any

import torch

from ..utils.typed import short, typed

# Values below 2^-64 share the first bin; it also bounds the factor below,
# which has to be a float32.
_MIN_EXPONENT = -64
_MAX_EXPONENT = 128  # all of float32

# Values counted at once. On a CPU a chunk and its int32 indices stay in the
# cache; on a GPU few large chunks mean few kernel launches.
_CHUNK_CPU = 1 << 18
_CHUNK_GPU = 1 << 24


class Histogram:
    """Counts of ``|x|`` in bins of equal width that start at 0.

    The range is the smallest power of two above the largest magnitude seen.
    """

    def __init__(self, num_bins: int = 4096):
        if not _is_power_of_two(num_bins) or not 2 <= num_bins <= 1 << 24:
            raise ValueError(
                "num_bins must be a power of two from 2 to 2^24, "
                f"got {short(num_bins)}"
            )
        self._counts = torch.zeros(num_bins, dtype=torch.int64)
        self._exponent = _MIN_EXPONENT
        self._max = 0.0

    # -- collecting --------------------------------------------------------

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Counts the magnitudes of a float tensor; raises on NaN or
        infinity."""
        if not x.is_floating_point():
            raise ValueError(f"a histogram needs floats, got {x.dtype}")
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
        self._widen(_exponent_above(largest))
        self._max = max(self._max, largest)
        new = _count(values, self.num_bins, self._exponent).cpu()
        # Not in place: under torch.inference_mode the counts may have become
        # an inference tensor, which nothing outside of it may write to.
        self._counts = self._counts + new

    def merge(self, other: "Histogram") -> "Histogram":
        """Adds the counts of another histogram, exactly, and returns this
        one."""
        if other.num_bins != self.num_bins:
            raise ValueError(
                f"cannot merge histograms of {self.num_bins} and "
                f"{other.num_bins} bins; collect both with the same num_bins"
            )
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
        """Number of bins."""
        return self._counts.numel()

    @property
    def counts(self) -> torch.Tensor:
        """A copy of the counts, int64 ``[num_bins]`` on the CPU."""
        return self._counts.clone()

    @property
    def count(self) -> int:
        """Number of values; 0 for an empty histogram."""
        return int(self._counts.sum())

    @property
    def range(self) -> float:
        """Upper edge of the last bin, a power of two above `max`."""
        return math.ldexp(1.0, self._exponent)

    @property
    def bin_width(self) -> float:
        """Width of each bin."""
        return self.range / self.num_bins

    @property
    def max(self) -> float:
        """Largest magnitude, exact. Raises ValueError if empty."""
        self._require_values()
        return self._max

    def edges(self) -> torch.Tensor:
        """Returns the bin edges, float64 ``[num_bins + 1]``."""
        index = torch.arange(self.num_bins + 1, dtype=torch.float64)
        return index * self.bin_width

    def centers(self) -> torch.Tensor:
        """Returns the bin centers, float64 ``[num_bins]``."""
        return self.edges()[:-1] + self.bin_width / 2

    def quantile(self, p: float) -> float:
        """Returns the magnitude below which the fraction ``p`` of the values
        lies.

        The values of a bin count as spread evenly, so the error is below a bin
        width.
        """
        if not 0 < p <= 1:
            raise ValueError(f"a quantile needs 0 < p <= 1, got {p!r}")
        self._require_values()
        if p == 1:
            return self._max
        cdf = self._counts.cumsum(0)
        target = p * int(cdf[-1])
        index = int(torch.searchsorted(cdf.double(), target))
        inside = int(self._counts[index])
        fraction = (target - (int(cdf[index]) - inside)) / inside
        left, right = self._span(index)
        return left + fraction * (right - left)

    # -- clipping ----------------------------------------------------------

    def clip(self, edge: float, drop: bool = False) -> "Histogram":
        """Returns the histogram of the data limited to ``edge``.

        Values above ``edge`` saturate, which is exact in every count, or are
        dropped. Dropping splits the bin of ``edge`` as :meth:`quantile` does;
        ``max`` is then an upper bound.
        """
        if not (math.isfinite(edge) and edge >= 0):
            raise ValueError(
                "the edge to clip at must be finite and not negative, got "
                f"{edge!r}"
            )
        self._require_values()
        result = self.copy()
        if edge >= self._max:
            return result
        index = int(edge / self.bin_width)
        above = int(self._counts[index + 1 :].sum())
        result._counts[index + 1 :] = 0
        result._max = edge
        if not drop:
            result._counts[index] += above
            return result
        left, right = self._span(index)
        fraction = (edge - left) / (right - left) if right > left else 0.0
        result._counts[index] = round(fraction * int(self._counts[index]))
        occupied = result._counts.nonzero()
        last = int(occupied[-1]) if len(occupied) else -1
        result._max = min(edge, (last + 1) * self.bin_width)
        return result

    def copy(self) -> "Histogram":
        """Returns an independent copy."""
        result = Histogram(self.num_bins)
        result._counts = self._counts.clone()
        result._exponent = self._exponent
        result._max = self._max
        return result

    # -- JSON --------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON; zeros at the end of the counts are left
        out."""
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
        """Reads and checks what :meth:`to_dict` returned."""
        state = typed(state, dict, "a histogram")
        missing = {"num_bins", "exponent", "max", "counts"} - set(state)
        if missing:
            raise ValueError(
                f"a histogram lacks {', '.join(sorted(missing))}; "
                "collect it again"
            )
        hist = cls(state["num_bins"])
        counts, largest = state["counts"], state["max"]
        exponent = state["exponent"]
        if not (
            type(counts) is list
            and len(counts) <= hist.num_bins
            and all(type(c) is int and c >= 0 for c in counts)
            # Sums of bins stay within int64.
            and sum(counts) < 1 << 62
            and type(exponent) is int
            and _MIN_EXPONENT <= exponent <= _MAX_EXPONENT
            and type(largest) in (int, float)
            and _lies_in_last_bin(largest, len(counts), exponent, hist.num_bins)
        ):
            raise ValueError(
                "a histogram's counts, max and exponent contradict each "
                "other; collect it again"
            )
        hist._counts[: len(counts)] = torch.tensor(counts, dtype=torch.int64)
        hist._exponent = exponent
        hist._max = float(largest)
        return hist

    def __repr__(self) -> str:
        return (
            f"Histogram(num_bins={self.num_bins}, count={self.count}, "
            f"max={self._max:.6g}, range=2^{self._exponent})"
        )

    # -- helpers -----------------------------------------------------------

    def _span(self, index: int) -> tuple[float, float]:
        """Returns the edges of a bin, the upper one not above ``max``."""
        left = index * self.bin_width
        return left, max(left, min(left + self.bin_width, self._max))

    def _require_values(self) -> None:
        """Raises if the histogram is empty."""
        if not bool(self._counts.any()):
            raise ValueError(
                "no values were collected; give the calibration set at "
                "least one utterance that reaches this layer"
            )


def _is_power_of_two(n: int) -> bool:
    """Whether ``n`` is an integer power of two."""
    is_int = isinstance(n, int) and not isinstance(n, bool)
    return is_int and n > 0 and n & (n - 1) == 0


def _lies_in_last_bin(
    value: float, used: int, exponent: int, num_bins: int
) -> bool:
    """Whether ``value`` lies in bin ``used - 1`` or on its upper edge."""
    width = math.ldexp(1.0, exponent) / num_bins
    return max(used - 1, 0) * width <= value <= used * width


def _exponent_above(value: float) -> int:
    """Returns the smallest `e` with `2^e > value`, not below the minimum."""
    # frexp: value = m * 2^e with 0.5 <= m < 1.
    return max(_MIN_EXPONENT, math.frexp(value)[1])


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
