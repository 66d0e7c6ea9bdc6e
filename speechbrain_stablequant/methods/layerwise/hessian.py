"""First and second moments of a layer's inputs.

A layer is linear: its squared output error over any number of frames is a
quadratic form in its weights, whose matrix is the second moment of its
inputs (a convolution's: unfolded into windows). It is exact for the whole
calibration set, costs [inputs x inputs] numbers however long the set is, and
an iteration over it costs less than one over the few thousand frames that a
minibatch would hold.
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
    """Means over the real frames of the calibration set.

    ``x`` is an input of the float model, ``q`` of the quantized prefix, on
    the layer's own activation grid; both unfolded in the order of a row of
    the weight. A convolution with groups has moments for each group.

    Arguments
    ---------
    rows : int
        Frames.
    float_mean, mean : torch.Tensor
        E[x], of what lies within the range of the activation grid, and E[q],
        [groups, inputs].
    gram : torch.Tensor or None
        E[q q'], [groups, inputs, inputs]; or what gives that of a group when
        it is indexed.
    cross : torch.Tensor or None
        E[x q'], likewise.
    """

    rows: int
    float_mean: torch.Tensor = field(repr=False)
    mean: torch.Tensor = field(repr=False)
    gram: Groups | None = field(repr=False, default=None)
    cross: Groups | None = field(repr=False, default=None)


def conv_groups(module: nn.Module) -> int:
    """Groups of a layer whose outputs see different inputs.

    Example
    -------
    >>> conv_groups(nn.Linear(2, 2)), conv_groups(nn.Conv1d(4, 4, 3, groups=2))
    (1, 2)
    """
    return module.groups if isinstance(module, nn.Conv1d) else 1


def unfolded(
    module: nn.Module,
    x: torch.Tensor,
    frames: Sequence[int] | None = None,
    groups: slice = slice(None),
) -> torch.Tensor:
    """Inputs of a layer as rows that its weight is multiplied with.

    Arguments
    ---------
    module : torch.nn.Module
        A Linear or Conv1d.
    x : torch.Tensor
        [..., in] of a Linear, [batch, in, time] of a Conv1d.
    frames : sequence of int, optional
        Real input frames of each utterance; None for all.
    groups : slice
        Groups of a convolution to unfold.

    Returns
    -------
    torch.Tensor
        [groups, rows, inputs].

    Example
    -------
    >>> conv, x = nn.Conv1d(2, 4, 3, 2, 1, groups=2), torch.randn(1, 2, 9)
    >>> rows = unfolded(conv, x)
    >>> rows.shape
    torch.Size([2, 5, 3])
    >>> out = torch.einsum("grk,gok->gor", rows, conv.weight.view(2, 2, 3))
    >>> expected = conv(x) - conv.bias[:, None]
    >>> torch.allclose(out.reshape(1, 4, 5), expected, atol=1e-6)
    True
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
    """Tensors that are added up over rows, by name.

    Example
    -------
    >>> sums = Sums()
    >>> for value in (1.0, 2.0):
    ...     sums.rows += 1
    ...     sums.add("x", torch.tensor(value))
    >>> sums["x"], sums.means()
    (tensor(3.), {'x': tensor(1.5000)})
    """

    rows = 0

    def add(self, name: str, value: torch.Tensor) -> None:
        """Adds to a sum; the first value becomes it."""
        if name in self:
            self[name] += value
        else:
            self[name] = value

    def join(self) -> None:
        """Takes up what other processes have added."""
        self.rows = sum(gathered(self.rows))
        for name in sorted(self):
            self[name] = summed(self[name])

    def means(self, *names: str) -> dict[str, torch.Tensor]:
        """Sums by their rows, float32; all of them where none is named.

        Raises
        ------
        ValueError
            Nothing was added.
        """
        if not self.rows:
            raise ValueError("the calibration set gives a layer no frame")
        return {k: (self[k] / self.rows).float() for k in names or self}


class MomentSum:
    """Adds up the moments batch by batch.

    Arguments
    ---------
    second : bool
        Whether second moments are wanted.
    cross : bool
        Whether those between the float and the quantized input are.
    edges : (float, float)
        Least and largest input on the activation grid. The mean is that of
        inputs cut to them: where a few frames are far beyond, their error is
        not one that all frames should take up.

    Example
    -------
    >>> total = MomentSum(second=True, cross=False)
    >>> x = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
    >>> total.add(x, x)
    >>> total.result().gram
    tensor([[[5., 1.],
             [1., 2.]]])
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
        """Adds a batch.

        Arguments
        ---------
        x, q : torch.Tensor
            [groups, rows, inputs] of the float and the quantized model.
        """
        self._sums.rows += q.shape[1]
        inside = x.clamp(*self.edges)
        self._sums.add("float_mean", inside.sum(1, dtype=torch.float64))
        self._sums.add("mean", q.sum(1, dtype=torch.float64))
        if self.second:
            self._sums.add("gram", q.mT @ q)
        if self.cross:
            self._sums.add("cross", x.mT @ q)

    def result(self) -> Moments:
        """The means of all that was added, in all processes.

        Raises
        ------
        ValueError
            Nothing was added.
        """
        self._sums.join()
        return Moments(self._sums.rows, **self._sums.means())
