"""First and second moments of a layer's inputs: its Hessian.

A layer's squared output error over the calibration set is a quadratic form in
its weights, whose matrix is the second moment of its inputs (for convolutions:
of their windows). It is exact and has [inputs x inputs] numbers for any size
of the set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from ...utils.distributed import gathered, summed


@dataclass
class Moments:
    """Means over the real frames of the calibration set, by group.

    ``x``: input of the float model; ``q``: of the quantized prefix, on the
    layer's activation grid; both unfolded like a row of the weight. Of inputs
    clamped to the grid ``float_mean`` is E[x]; ``mean`` is E[q], both [groups,
    inputs]; ``gram`` is the Hessian E[q q'] and ``cross`` E[x q'], [groups,
    inputs, inputs] or a :class:`~.conv_hessian.LagMoments`.
    """

    rows: int
    float_mean: torch.Tensor = field(repr=False)
    mean: torch.Tensor = field(repr=False)
    gram: Sequence[torch.Tensor] | None = field(repr=False, default=None)
    cross: Sequence[torch.Tensor] | None = field(repr=False, default=None)


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

    ``edges``: least and largest input on the activation grid. E[x] is taken of
    clamped inputs: the bias should not compensate the error of a few outliers.
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
        """Adds to a sum; takes over the first value."""
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def add(self, x: torch.Tensor, q: torch.Tensor) -> None:
        """Adds a batch of both models."""
        self.rows += q.shape[1]
        inside = x.clamp(*self.edges)
        self.sum_up("float_mean", inside.sum(1, dtype=torch.float64))
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
        """The moments of all that was added, in all processes."""
        means = self.means("float_mean", "mean", *self.pairs)
        return Moments(self.rows, **means)
