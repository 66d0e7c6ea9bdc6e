"""First and second moments of a layer's inputs: its Hessian.

A layer's squared output error over the calibration set is a quadratic form in
its weights, whose matrix is the second moment of its inputs (for convolutions:
of their windows). It is exact and has [inputs x inputs] numbers for any size
of the set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from ...utils.distributed import gathered, summed


class Groups(Protocol):
    """A matrix for each group, such as a tensor [groups, rows, columns]."""

    def __getitem__(self, g: int) -> torch.Tensor:
        """The matrix of a group."""


@dataclass
class Moments:
    """Means over the real frames of the calibration set, by group.

    ``x``: input of the float model; ``q``: of the quantized prefix, on the
    layer's activation grid; both unfolded like a row of the weight.

    Arguments
    ---------
    rows : int
        Frames.
    float_mean, mean : torch.Tensor
        E[x] of inputs clamped to the activation grid and E[q],
        [groups, inputs].
    gram : Groups or None
        The Hessian E[q q'], [groups, inputs, inputs].
    cross : Groups or None
        E[x q'], likewise.
    """

    rows: int
    float_mean: torch.Tensor = field(repr=False)
    mean: torch.Tensor = field(repr=False)
    gram: Groups | None = field(repr=False, default=None)
    cross: Groups | None = field(repr=False, default=None)


def conv_groups(module: nn.Module) -> int:
    """Groups of a layer whose outputs see different inputs; 1 for a Linear."""
    return module.groups if isinstance(module, nn.Conv1d) else 1


def unfolded(
    module: nn.Module,
    x: torch.Tensor,
    frames: Sequence[int] | None = None,
    groups: slice = slice(None),
) -> torch.Tensor:
    """Inputs as rows that the weight multiplies, [groups, rows, inputs].

    ``x``: [..., in] of a Linear, [batch, in, time] of a Conv1d; ``frames``:
    real input frames of each utterance; ``groups``: groups to unfold.
    """
    if not isinstance(module, nn.Conv1d):
        if frames is not None and x.dim() == 3:
            rows = [row[:n] for row, n in zip(x, frames, strict=True)]
            return torch.cat(rows)[None]
        return x.reshape(1, -1, x.shape[-1])
    (kernel,), (stride,) = module.kernel_size, module.stride
    (dilation,), (padding,) = module.dilation, module.padding
    count = module.groups
    x = x.view(x.shape[0], count, -1, x.shape[2])[:, groups]
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


class Sums(dict[str, torch.Tensor]):
    """Tensors that are summed over rows, by name."""

    rows = 0

    def add(self, name: str, value: torch.Tensor) -> None:
        """Adds to a sum; takes over the first value."""
        if name in self:
            self[name] += value
        else:
            self[name] = value

    def join(self) -> None:
        """Adds the sums of other processes."""
        self.rows = sum(gathered(self.rows))
        for name in sorted(self):
            self[name] = summed(self[name])

    def means(self, *names: str) -> dict[str, torch.Tensor]:
        """Sums divided by rows, float32; all of them if none is named."""
        if not self.rows:
            raise ValueError(
                "the calibration set has no frame for it; use longer audio"
            )
        return {k: (self[k] / self.rows).float() for k in names or self}


class MomentSum:
    """Sums the moments batch by batch.

    ``edges``: least and largest input on the activation grid. E[x] is taken of
    clamped inputs: the bias should not compensate the error of a few outliers.
    """

    def __init__(
        self,
        second: bool,
        cross: bool,
        edges: tuple[float, float] = (-math.inf, math.inf),
    ):
        self.second = second
        self.edges = edges
        self.cross = cross
        self._sums = Sums()

    def add(self, x: torch.Tensor, q: torch.Tensor) -> None:
        """Adds a batch, [groups, rows, inputs] of both models."""
        self._sums.rows += q.shape[1]
        inside = x.clamp(*self.edges)
        self._sums.add("float_mean", inside.sum(1, dtype=torch.float64))
        self._sums.add("mean", q.sum(1, dtype=torch.float64))
        if self.second:
            self._sums.add("gram", q.mT @ q)
        if self.cross:
            self._sums.add("cross", x.mT @ q)

    def result(self) -> Moments:
        """Means over all that was added, in all processes."""
        self._sums.join()
        return Moments(self._sums.rows, **self._sums.means())
