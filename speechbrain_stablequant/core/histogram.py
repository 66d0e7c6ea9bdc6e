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
    """Counts of `|x|` in bins of equal width that start at 0.

    The range is the smallest power of two strictly greater than the largest
    magnitude seen, so that the occupied part is between a half and all of it.

    Arguments
    ---------
    num_bins : int
        Number of bins, a power of two.

    Raises
    ------
    ValueError
        If `num_bins` is not a power of two from 2 to 2^24.

    Example
    -------
    >>> hist = Histogram(num_bins=8)
    >>> hist.add(torch.tensor([0.1, -0.6, 3.0]))
    >>> hist.range, hist.counts.tolist()
    (4.0, [1, 1, 0, 0, 0, 0, 1, 0])
    >>> hist.count, hist.max
    (3, 3.0)
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
        """Counts the magnitudes of a tensor.

        Arguments
        ---------
        x : torch.Tensor
            Any shape, any device, a floating dtype; counted as float32.

        Raises
        ------
        ValueError
            If a value is NaN or infinite, or `x` is not floating. Nothing is
            counted then.

        Example
        -------
        >>> hist = Histogram()
        >>> hist.add(torch.randn(2, 3, 5))
        >>> hist.count
        30
        """
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
        """Adds the counts of another histogram to this one.

        The order of merges does not matter. Exact: the result is that of one
        histogram that saw all of the data.

        Arguments
        ---------
        other : Histogram
            The same `num_bins`, any range. Stays as it is.

        Returns
        -------
        Histogram
            This histogram.

        Raises
        ------
        ValueError
            If the numbers of bins differ.

        Example
        -------
        >>> a, b = Histogram(), Histogram()
        >>> a.add(torch.tensor([0.5]))
        >>> b.add(torch.tensor([80.0, 2.0]))
        >>> a.merge(b).count
        3
        """
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
        """Grows the range to at least `2^exponent`."""
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
        """int64 `[num_bins]` on the CPU, a copy."""
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
        """Returns the bin edges.

        Returns
        -------
        torch.Tensor
            float64 `[num_bins + 1]`, from 0 to `range`.

        Example
        -------
        >>> hist = Histogram(num_bins=2)
        >>> hist.add(torch.tensor([1.5]))
        >>> hist.edges()
        tensor([0., 1., 2.], dtype=torch.float64)
        """
        index = torch.arange(self.num_bins + 1, dtype=torch.float64)
        return index * self.bin_width

    def centers(self) -> torch.Tensor:
        """Returns the bin centers.

        Returns
        -------
        torch.Tensor
            float64 `[num_bins]`.

        Example
        -------
        >>> hist = Histogram(num_bins=2)
        >>> hist.add(torch.tensor([1.5]))
        >>> hist.centers()
        tensor([0.5000, 1.5000], dtype=torch.float64)
        """
        return self.edges()[:-1] + self.bin_width / 2

    def quantile(self, p: float) -> float:
        """Returns the magnitude below which the fraction `p` of the data lies.

        The mass of a bin counts as spread evenly over it (over its part up to
        `max` in the bin that holds `max`), so the error is below one bin
        width. The cumulative sum is exact and divided in float64.

        Arguments
        ---------
        p : float
            Fraction in (0, 1].

        Returns
        -------
        float
            Never above `max`; exactly `max` for `p = 1`.

        Raises
        ------
        ValueError
            If `p` is outside of (0, 1] or no values were collected.

        Example
        -------
        >>> hist = Histogram()
        >>> hist.add(torch.arange(1, 101).float())
        >>> abs(hist.quantile(0.5) - 50) < hist.bin_width + 1, hist.quantile(1)
        (True, 100.0)
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
        """Returns the histogram of the data limited to `edge`.

        `edge` lies inside a bin as a rule. Saturating (`drop=False`) is still
        exact in every count: what lay above `edge` becomes `edge` and thereby
        belongs to that bin. Dropping splits that bin: as in `quantile`, its
        mass counts as spread evenly, and the part above `edge` is discarded
        (rounded to whole values), so that `clip(quantile(p), drop=True)`
        keeps the fraction `p`. The bins stay as wide as they are: what is
        finer is not known any more.

        Arguments
        ---------
        edge : float
            Finite, at least 0. Nothing changes if `max` is not above it.
        drop : bool
            Discard what lies above `edge` instead of saturating it. This may
            leave an empty histogram.

        Returns
        -------
        Histogram
            A new histogram; its `max` is at most `edge`. After a drop `max`
            is an upper bound (the edge of the last occupied bin), since the
            largest value that is left is not known.

        Raises
        ------
        ValueError
            If `edge` is negative or not finite, or no values were collected.

        Example
        -------
        >>> hist = Histogram(num_bins=8)
        >>> hist.add(torch.tensor([0.5, 1.5, 7.0]))
        >>> hist.clip(2.0).counts.tolist(), hist.clip(2.0).max
        ([1, 1, 1, 0, 0, 0, 0, 0], 2.0)
        >>> hist.clip(2.0, drop=True).count
        2
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
        """Returns an independent copy.

        Returns
        -------
        Histogram
            The same counts, range and `max`.

        Example
        -------
        >>> hist = Histogram()
        >>> hist.copy().add(torch.ones(3))
        >>> hist.count
        0
        """
        result = Histogram(self.num_bins)
        result._counts = self._counts.clone()
        result._exponent = self._exponent
        result._max = self._max
        return result

    # -- JSON --------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Returns a form that `json` can write.

        Returns
        -------
        dict
            `num_bins`, `exponent` (the range is `2^exponent`), `max` and
            `counts` without the zeros at its end. Plain int and float.

        Example
        -------
        >>> hist = Histogram(num_bins=8)
        >>> hist.add(torch.tensor([1.0, 2.5]))
        >>> hist.to_dict()["counts"]
        [0, 0, 1, 0, 0, 1]
        """
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
        """Reads what `to_dict` returned.

        Arguments
        ---------
        state : dict
            As from `to_dict`.

        Returns
        -------
        Histogram
            Equal to the one that was written.

        Raises
        ------
        ValueError
            If a key is missing or the values contradict each other.

        Example
        -------
        >>> hist = Histogram(num_bins=8)
        >>> hist.add(torch.tensor([1.0, 2.5]))
        >>> Histogram.from_dict(hist.to_dict()).max
        2.5
        """
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
        """Returns the edges of a bin, the upper one not above `max`."""
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
    """Says whether `n` is an integer power of two."""
    is_int = isinstance(n, int) and not isinstance(n, bool)
    return is_int and n > 0 and n & (n - 1) == 0


def _lies_in_last_bin(
    value: float, used: int, exponent: int, num_bins: int
) -> bool:
    """Says whether `value` lies in bin `used - 1` or on its upper edge."""
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
