"""Calls of a module: their tensors, what changes between them, new ones."""

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from ...core.parts import Leaf
from ...utils.typed import short

logger = logging.getLogger(__name__)

#: Tensors up to this size are stored by value.
_FEW = 16


class CaptureError(ValueError):
    """A module that cannot be captured, and why, in one line."""


@functools.cache
def say_uncaptured(name: str) -> None:
    """Say once that a call is not one of those that were captured."""
    logger.warning(
        "'%s' is called in another way than when its plan was made: such "
        "calls are computed layer by layer, which takes longer",
        name,
    )


class Call(NamedTuple):
    """Arguments of one call."""

    args: tuple
    kwargs: dict[str, Any]


class Signature(NamedTuple):
    """What the calls of a module have in common."""

    structure: TreeSpec
    leaves: list[Leaf]

    def tensors(self, call: Call) -> list[torch.Tensor] | None:
        """The tensors of a call; None if the call is another one."""
        values, structure = tree_flatten((call.args, call.kwargs))
        if structure != self.structure:
            return None
        found = []
        for value, leaf in zip(values, self.leaves, strict=True):
            if leaf.shape is None:
                if type(value) is not type(leaf.value) or value != leaf.value:
                    return None
            elif not _fits(value, leaf):
                return None
            else:
                found.append(value)
        return found

    def call(self, tensors: Sequence[torch.Tensor]) -> Call:
        """The call with these tensors."""
        given = iter(tensors)
        values = [
            leaf.value if leaf.shape is None else next(given)
            for leaf in self.leaves
        ]
        return Call(*tree_unflatten(values, self.structure))

    @property
    def inputs(self) -> list[Leaf]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if leaf.shape is not None]

    def example(self, batch: int = 1) -> list[torch.Tensor]:
        """Tensors like those of the longest call."""
        return enlarged([_example(leaf) for leaf in self.inputs], self, batch)

    def dumps(self) -> str:
        """The structure as text."""
        return treespec_dumps(self.structure)

    @classmethod
    def loads(cls, structure: str, leaves: list[Leaf]) -> "Signature":
        """The signature that :meth:`dumps` wrote."""
        return cls(treespec_loads(structure), leaves)


def _fits(value: Any, leaf: Leaf) -> bool:
    """Whether a value may take the place of a tensor."""
    if not isinstance(value, torch.Tensor) or value.dim() != len(leaf.shape):
        return False
    if _dtype(value) != leaf.dtype:
        return False
    return all(
        axis in leaf.free or size == value.shape[axis]
        for axis, size in enumerate(leaf.shape)
    )


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _example(leaf: Leaf) -> torch.Tensor:
    dtype = getattr(torch, leaf.dtype)
    if isinstance(leaf.value, list):
        return torch.tensor(leaf.value, dtype=dtype).reshape(leaf.shape)
    if leaf.value is not None:
        return torch.full(leaf.shape, leaf.value, dtype=dtype)
    generator = torch.Generator().manual_seed(17)
    if dtype.is_floating_point:
        x = torch.randn(leaf.shape, generator=generator)
    else:
        x = torch.ones(leaf.shape)
    return x.to(dtype)


def signature_of(calls: Sequence[Call]) -> Signature:
    """The signature of calls; :class:`CaptureError` if they have none."""
    rows = [tree_flatten((call.args, call.kwargs)) for call in calls]
    structure = rows[0][1]
    if any(other != structure for _, other in rows):
        raise CaptureError("its calls have different arguments")
    columns = list(zip(*(values for values, _ in rows), strict=True))
    first = next((c for c in columns if isinstance(c[0], torch.Tensor)), None)
    if first is None or not first[0].dim():
        raise CaptureError("it is not called with a tensor")
    batches = [x.shape[0] for x in first]
    longest = max(range(len(rows)), key=lambda i: first[i][0].numel())
    leaves = [_leaf(column, batches, longest) for column in columns]
    signature = Signature(structure, leaves)
    length = _time(signature)
    sequences = [
        leaf.shape[1]
        for leaf in signature.inputs
        if leaf.batched and len(leaf.shape) > 2 and leaf.dtype == "float32"
    ]
    if not {*sequences} <= {length, 2 * length - 1}:
        raise CaptureError("it takes two sequences, as a decoder does")
    return signature


def _leaf(column: tuple, batches: Sequence[int], longest: int) -> Leaf:
    value = column[longest]
    if not isinstance(value, torch.Tensor):
        if not isinstance(value, bool | int | float | str | None):
            kind = type(value).__name__
            raise CaptureError(f"it is called with a {kind}")
        if any(x != value for x in column):
            raise CaptureError(f"it is called with {short(value)} and others")
        return Leaf(value=value)
    kinds = {
        (x.dim(), x.dtype) if isinstance(x, torch.Tensor) else None
        for x in column
    }
    if len(kinds) > 1 or value.is_complex():
        raise CaptureError("a tensor in its calls is of different kinds")
    if value.dtype == torch.long and value.dim() > 1 and int(value.max()) > 1:
        raise CaptureError("it is called with labels")
    batched = value.dim() > 0 and all(
        x.shape[0] == size for x, size in zip(column, batches, strict=True)
    )
    row = value[:1] if batched else value
    dynamic = [
        axis
        for axis in range(batched, value.dim())
        if len({x.shape[axis] for x in column}) > 1
    ]
    kept: Any = None
    if not bool(row.isfinite().all()):
        pass  # masks in scores; JSON has no infinity
    elif row.numel() <= _FEW:
        kept = row.flatten().tolist()
    elif bool((row == row.flatten()[0]).all()):
        kept = row.flatten()[0].item()
    return Leaf(list(row.shape), _dtype(value), dynamic, batched, kept)


# -- new calls -----------------------------------------------------------------


def enlarged(
    tensors: Sequence[torch.Tensor], signature: Signature, batch: int
) -> list[torch.Tensor]:
    """A call with so many utterances: further ones have other values, and are
    shorter where a tensor tells lengths or masks."""
    found = []
    for x, leaf in zip(tensors, signature.inputs, strict=True):
        x = x.detach()
        while leaf.batched and len(x) < batch:
            x = torch.cat([x, _other(x[:1], leaf)])
        found.append(x[:batch] if leaf.batched else x)
    return found


def _other(row: torch.Tensor, leaf: Leaf) -> torch.Tensor:
    """Another utterance than ``row``."""
    if row.dim() == 1:  # its length, relative or in frames
        if not row.is_floating_point():
            return (row * 3) // 4
        return row * 0.75
    if row.is_floating_point():
        return row.flip(leaf.dynamic) * 0.5
    if not leaf.dynamic:
        return row
    axis = leaf.dynamic[-1]
    masked = row.clone()
    start = row.shape[axis] * 3 // 4
    end = masked.narrow(axis, start, row.shape[axis] - start)
    end.copy_(~end if row.dtype == torch.bool else 1 - end)
    return masked


def between(
    tensors: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    signature: Signature,
) -> list[torch.Tensor] | None:
    """A call whose lengths lie halfway between those of two others; None if
    one would not be whole."""
    found = []
    for x, y, leaf in zip(tensors, others, signature.inputs, strict=True):
        for axis in leaf.dynamic:
            total = x.shape[axis] + y.shape[axis]
            if total % 2:
                return None
            x = x.narrow(axis, 0, total // 2)
        found.append(x)
    return found


def guessed(signature: Signature) -> Signature:
    """The signature of calls of one length, with the axes that are likely to
    change: those as long as axis 1 of the first tensor, and relative
    positions, of twice that length less 1."""
    length = _time(signature)

    def with_axes(leaf: Leaf) -> Leaf:
        axes = [
            axis
            for axis in range(leaf.batched, len(leaf.shape or ()))
            if leaf.shape[axis] in (length, 2 * length - 1)
        ]
        return replace(leaf, dynamic=axes)

    return signature._replace(leaves=list(map(with_axes, signature.leaves)))


def unbatched(signature: Signature) -> Iterator[Signature]:
    """The signature of calls with one utterance, and where another tensor than
    the first has no batch: in such calls every axis of length 1 might count
    the utterances."""
    yield signature
    places = [i for i, leaf in enumerate(signature.leaves) if leaf.batched]
    for place in places[1:]:
        leaves = list(signature.leaves)
        leaves[place] = replace(leaves[place], batched=False)
        yield signature._replace(leaves=leaves)


def _time(signature: Signature) -> int:
    return next((x.shape[1] for x in signature.inputs if len(x.shape) > 1), 0)


def shortened(
    tensors: Sequence[torch.Tensor], signature: Signature, share: float
) -> list[torch.Tensor]:
    """A call with a share of its length, for a guessed signature."""
    length, found = _time(signature), []
    size = max(int(length * share), 1)
    for x, leaf in zip(tensors, signature.inputs, strict=True):
        for axis in leaf.dynamic:
            whole = x.shape[axis] == length
            x = x.narrow(axis, 0, size if whole else 2 * size - 1)
        found.append(x)
    return found


def lengths_of(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """Shapes without the batch, to tell calls of different lengths."""
    return tuple(tuple(x.shape[1:]) for x in tensors)


def by_length(
    calls: Sequence[list[torch.Tensor]],
) -> list[list[torch.Tensor]]:
    """One call of each length, the longest first, those of most utterances
    preferred."""
    ordered = sorted(
        calls, key=lambda t: (lengths_of(t), t[0].shape[0]), reverse=True
    )
    groups = itertools.groupby(ordered, lengths_of)
    return [next(group) for _, group in groups]
