"""Moments of a convolution with stride one, by lags.

Its windows overlap in all but one frame, so that two entries have the second
moment of their lag, except for the frames at both ends: with windows
t = 0..T-1 of a signal x, entry (c, k) of window t being x[c, t + k],

    G[(c, k+1), (d, j+1)] = G[(c, k), (d, j)]
                            - x[c, k] x[d, j] + x[c, T+k] x[d, T+j].

Summing the first row and column of blocks and the ends takes one K-th of the
products, for a kernel of K frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from ...utils.distributed import gathered_tensors
from .hessian import Moments, Sums

# Windows of shorter kernels overlap too little to be worth it.
_KERNEL = 8


def slides(module: nn.Module) -> bool:
    """Whether the moments of a layer are computed by lags."""
    return isinstance(module, nn.Conv1d) and (
        module.stride == (1,)
        and module.dilation == (1,)
        and module.kernel_size[0] >= _KERNEL
    )


def signals(
    module: nn.Conv1d,
    x: torch.Tensor,
    frames: Sequence[int] | None = None,
    groups: slice = slice(None),
) -> list[torch.Tensor]:
    """The signal of each utterance, padded: [groups, in / groups, time].

    ``x`` is [batch, in, time]; utterances without a window are left out.
    """
    (padding,), (kernel,) = module.padding, module.kernel_size
    x = x.view(x.shape[0], module.groups, -1, x.shape[2])[:, groups]
    padded = F.pad(x, (padding, padding))
    if frames is None:
        frames = [x.shape[3]] * len(x)
    lengths = [n + 2 * padding for n in frames]
    return [
        one[..., :length]
        for one, length in zip(padded, lengths, strict=True)
        if length >= kernel
    ]


@dataclass
class LagMoments:
    """Second moments [groups, inputs, inputs], made when a group is indexed.

    Arguments
    ---------
    rows : int
        Windows.
    first_row, first_column : torch.Tensor
        float64 sums over windows, [groups, in, in, kernel]: the left signal's
        first frame with all frames of the right window, and vice versa.
    heads, tails : (torch.Tensor, torch.Tensor)
        First and last frames of the left and right signals,
        [groups, utterances, in, kernel - 1].
    """

    rows: int
    first_row: torch.Tensor = field(repr=False)
    first_column: torch.Tensor = field(repr=False)
    heads: tuple[torch.Tensor, torch.Tensor] = field(repr=False)
    tails: tuple[torch.Tensor, torch.Tensor] = field(repr=False)

    def __getitem__(self, g: int) -> torch.Tensor:
        row, column = self.first_row[g], self.first_column[g]
        left, right, kernel = row.shape
        ends = self._ends(g)
        sums = row.new_empty(left, kernel, right, kernel)
        sums[:, 0] = row
        sums[..., 0] = column.permute(1, 2, 0)
        for k in range(kernel - 1):
            sums[:, k + 1, :, 1:] = sums[:, k, :, :-1] + ends[:, k]
        return sums.view(left * kernel, -1).div_(self.rows).float()

    def _ends(self, g: int) -> torch.Tensor:
        """Change of each entry by one step along both windows."""
        (head, other_head), (tail, other_tail) = self.heads, self.tails
        left = torch.cat([tail[g], -head[g]]).flatten(1).double()
        right = torch.cat([other_tail[g], other_head[g]]).flatten(1).double()
        _, _, channels, frames = head.shape
        return (left.T @ right).view(channels, frames, -1, frames)


class LagSum:
    """Sums moments like :class:`~.hessian.MomentSum`, of :func:`signals`.

    ``kernel``: frames of a window.
    """

    def __init__(
        self,
        kernel: int,
        second: bool,
        cross: bool,
        edges: tuple[float, float] = (-math.inf, math.inf),
    ):
        self.kernel = kernel
        self.edges = edges
        self.pairs = ["gram"] * second + ["cross"] * cross
        self._sums = Sums()
        self._ends: dict[str, list[torch.Tensor]] = {}

    def add(
        self, floats: Sequence[torch.Tensor], integers: Sequence[torch.Tensor]
    ) -> None:
        """Adds a batch, the signals of both models."""
        for x, q in zip(floats, integers, strict=True):
            rows = x.shape[2] - self.kernel + 1
            self._sums.rows += rows
            self._sums.add("float_mean", self._mean(x.clamp(*self.edges), rows))
            self._sums.add("mean", self._mean(q, rows))
            for name in self.pairs:
                left = q if name == "gram" else x
                self._sums.add(f"{name} row", self._products(left, q, rows))
                # The column of a Gram matrix equals its row.
                if name == "cross":
                    self._sums.add("cross column", self._products(q, x, rows))
            if self.pairs:
                for name, signal in (("float", x), ("integer", q)):
                    head = signal[..., : self.kernel - 1]
                    tail = signal[..., rows:]
                    self._ends.setdefault(f"{name} heads", []).append(head)
                    self._ends.setdefault(f"{name} tails", []).append(tail)

    def _mean(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Sum of the windows, [groups, inputs]."""
        sums = F.pad(x.double().cumsum(-1), (1, 0))
        return (sums[..., rows:] - sums[..., : self.kernel]).flatten(1)

    def _products(
        self, first: torch.Tensor, other: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """Sums of a window's first frame times all frames of the other's.

        [groups, in, in, kernel]
        """
        windows = other.unfold(2, self.kernel, 1).permute(0, 2, 1, 3)
        # Group by group, since windows are copied.
        found = torch.stack(
            [
                left[:, :rows] @ right.flatten(1)
                for left, right in zip(first, windows, strict=True)
            ]
        )
        return found.unflatten(2, (-1, self.kernel)).double()

    def result(self) -> Moments:
        """Means over all that was added, in all processes."""
        self._sums.join()
        means = self._sums.means("float_mean", "mean")
        ends = {
            name: torch.cat(gathered_tensors(torch.stack(parts, 1)), 1)
            for name, parts in self._ends.items()
        }
        second = {}
        for name in self.pairs:
            left = "integer" if name == "gram" else "float"
            row = self._sums[f"{name} row"]
            second[name] = LagMoments(
                self._sums.rows,
                row,
                self._sums.get(f"{name} column", row),
                (ends[f"{left} heads"], ends["integer heads"]),
                (ends[f"{left} tails"], ends["integer tails"]),
            )
        return Moments(self._sums.rows, **means, **second)
