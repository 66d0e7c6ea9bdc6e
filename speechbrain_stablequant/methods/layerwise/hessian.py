"""First and second moments of a layer's inputs: its Hessian.

A layer's squared output error over the calibration set is a quadratic form in
its weights, whose matrix is the second moment of its inputs (for convolutions:
of their windows). It is exact and has [inputs x inputs] numbers for any size
of the set.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ...utils.distributed import gathered, gathered_tensors, summed

# Windows of shorter kernels overlap too little for :class:`LagMoments`.
_LAG_KERNEL = 8


@dataclass
class Moments:
    """Means over the real frames of the calibration set, by group of inputs.

    ``rows``: number of frames or, of a convolution, windows.

    x is the input in the float model, clamped to the range of the layer's
    activation grid, and q behind the quantized prefix, on that grid; both are
    unfolded like a row of the weight.
    """

    rows: int
    float_mean: torch.Tensor  # E[x], [groups, inputs]
    mean: torch.Tensor  # E[q], [groups, inputs]
    # E[q q'] and E[x q'] by group: [groups, inputs, inputs] or LagMoments
    gram: Sequence[torch.Tensor] | None = None
    cross: Sequence[torch.Tensor] | None = None


def unfolded(
    module: nn.Module,
    x: torch.Tensor,
    frames: Sequence[int] | None = None,
    groups: slice = slice(None),
) -> torch.Tensor:
    """Inputs as rows that the weight multiplies, [groups, rows, inputs].

    ``x``: [..., in] of a Linear, [batch, in, time] of a Conv1d, [batch, in,
    height, width] of a Conv2d; ``frames``: real input frames of each
    utterance; ``groups``: groups to unfold.
    """
    if isinstance(module, nn.Conv2d):
        geometry = module.dilation, module.padding, module.stride
        windows = F.unfold(x, module.kernel_size, *geometry)
        windows = windows.unflatten(1, (module.groups, -1))[:, groups]
        return windows.permute(1, 0, 3, 2).flatten(1, 2)
    if not isinstance(module, nn.Conv1d):
        if frames is not None and x.dim() == 3:
            rows = [row[:n] for row, n in zip(x, frames, strict=True)]
            return torch.cat(rows)[None]
        return x.reshape(1, -1, x.shape[-1])
    (kernel,), (stride,) = module.kernel_size, module.stride
    (dilation,), (padding,) = module.dilation, module.padding
    x = x.view(x.shape[0], module.groups, -1, x.shape[2])[:, groups]
    span = dilation * (kernel - 1) + 1
    padded = F.pad(x, (padding, padding))
    windows = padded.unfold(3, span, stride)[..., ::dilation]
    # [batch, groups, in / groups, time, kernel] -> rows of the weight
    windows = windows.permute(1, 0, 3, 2, 4).flatten(3)
    if frames is None:
        return windows.flatten(1, 2)
    kept = [
        windows[:, i, : max((n + 2 * padding - span) // stride + 1, 0)]
        for i, n in enumerate(frames)
    ]
    return torch.cat(kept, 1)


class MomentSum:
    """Sums the moments batch by batch, of :func:`unfolded` inputs.

    ``edges``: least and largest input on the activation grid. Float inputs are
    clamped to them: neither weights nor bias should compensate the error of a
    few outliers.
    """

    def __init__(
        self,
        second: bool,
        cross: bool,
        edges: tuple[float, float] = (-math.inf, math.inf),
    ):
        self.pairs = ["gram"] * second + ["cross"] * cross
        self.edges = edges
        self.rows = 0
        self.sums: dict[str, torch.Tensor] = {}

    def sum_up(self, name: str, value: torch.Tensor) -> None:
        # In float64 the order hardly matters: any number of processes rounds
        # the weights alike.
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.double()

    def add(self, x: torch.Tensor, q: torch.Tensor) -> None:
        self.rows += q.shape[1]
        x = x.clamp(*self.edges)
        self.sum_up("float_mean", x.sum(1, dtype=torch.float64))
        self.sum_up("mean", q.sum(1, dtype=torch.float64))
        for name in self.pairs:
            left = q if name == "gram" else x
            self.sum_up(name, left.mT @ q)

    def means(self, *names: str) -> dict[str, torch.Tensor]:
        """Means over all that was added, in all processes, float32."""
        self.rows = sum(gathered(self.rows))
        for name in sorted(self.sums):
            self.sums[name] = summed(self.sums[name])
        if not self.rows:
            raise ValueError(
                "the calibration set has no frame for it; use longer audio"
            )
        return {name: (self.sums[name] / self.rows).float() for name in names}

    def result(self) -> Moments:
        means = self.means("float_mean", "mean", *self.pairs)
        return Moments(self.rows, **means)


# -- by lags -------------------------------------------------------------------


def slides(module: nn.Module) -> bool:
    """Whether the moments of a layer are computed by lags."""
    return isinstance(module, nn.Conv1d) and (
        module.stride == (1,)
        and module.dilation == (1,)
        and module.kernel_size[0] >= _LAG_KERNEL
    )


def signals(
    module: nn.Conv1d,
    x: torch.Tensor,
    frames: Sequence[int] | None = None,
    groups: slice = slice(None),
) -> list[torch.Tensor]:
    """Padded signals [groups, in / groups, time] that have a window."""
    (padding,), (kernel,) = module.padding, module.kernel_size
    x = x.view(x.shape[0], module.groups, -1, x.shape[2])[:, groups]
    padded = F.pad(x, (padding, padding))
    if frames is None:
        frames = [x.shape[3]] * len(x)
    return [
        one[..., : n + 2 * padding]
        for one, n in zip(padded, frames, strict=True)
        if n + 2 * padding >= kernel
    ]


@dataclass
class LagMoments:
    """Second moments [groups, inputs, inputs], made when a group is indexed.

    Windows of stride one overlap in all but one frame, so two entries have the
    second moment of their lag, except for the frames at both ends: with windows
    t = 0..T-1 of a signal x, entry (c, k) of window t being x[c, t + k],

        G[(c, k+1), (d, j+1)] = G[(c, k), (d, j)]
                                - x[c, k] x[d, j] + x[c, T+k] x[d, T+j].

    Summing the first row and column of blocks and the ends takes one K-th of
    the products, for a kernel of K frames.

    ``first_row``, ``first_column``: float64 sums over windows, [groups, in, in,
    kernel], of the left signal's first frame with all frames of the right
    window, and vice versa. ``heads``, ``tails``: first and last frames of the
    left and right signals, [groups, utterances, in, kernel - 1].
    """

    rows: int
    first_row: torch.Tensor
    first_column: torch.Tensor
    heads: tuple[torch.Tensor, torch.Tensor]
    tails: tuple[torch.Tensor, torch.Tensor]

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


class LagSum(MomentSum):
    """Sums the moments batch by batch, of :func:`signals`."""

    def __init__(
        self,
        kernel: int,
        second: bool,
        cross: bool,
        edges: tuple[float, float] = (-math.inf, math.inf),
    ):
        super().__init__(second, cross, edges)
        self.kernel = kernel
        # First and last frames of the float and of the integer signals.
        self._heads: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._tails: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(
        self, floats: Sequence[torch.Tensor], integers: Sequence[torch.Tensor]
    ) -> None:
        for x, q in zip(floats, integers, strict=True):
            x = x.clamp(*self.edges)
            rows = x.shape[2] - self.kernel + 1
            self.rows += rows
            self.sum_up("float_mean", self._mean(x, rows))
            self.sum_up("mean", self._mean(q, rows))
            for name in self.pairs:
                left = q if name == "gram" else x
                self.sum_up(f"{name} row", self._products(left, q, rows))
                # The column of a Gram matrix equals its row.
                if name == "cross":
                    column = self._products(q, x, rows)
                    self.sum_up("cross column", column)
            if self.pairs:
                for name, signal in (("gram", q), ("cross", x)):
                    self._heads[name].append(signal[..., : self.kernel - 1])
                    self._tails[name].append(signal[..., rows:])

    def _mean(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Sum of the windows, [groups, inputs]."""
        sums = F.pad(x.double().cumsum(-1), (1, 0))
        return (sums[..., rows:] - sums[..., : self.kernel]).flatten(1)

    def _products(
        self, first: torch.Tensor, other: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """First frames times windows: [groups, in, in, kernel]."""
        windows = other.unfold(2, self.kernel, 1).permute(0, 2, 1, 3)
        # Group by group, since windows are copied.
        found = torch.stack(
            [
                left[:, :rows] @ right.flatten(1)
                for left, right in zip(first, windows, strict=True)
            ]
        )
        return found.unflatten(2, (-1, self.kernel))

    def result(self) -> Moments:
        means = self.means("float_mean", "mean")
        heads, tails = (
            {
                name: torch.cat(gathered_tensors(torch.stack(parts, 1)), 1)
                for name, parts in ends.items()
            }
            for ends in (self._heads, self._tails)
        )
        second = {}
        for name in self.pairs:
            row = self.sums[f"{name} row"]
            second[name] = LagMoments(
                self.rows,
                row,
                self.sums.get(f"{name} column", row),
                (heads[name], heads["gram"]),
                (tails[name], tails["gram"]),
            )
        return Moments(self.rows, **means, **second)
