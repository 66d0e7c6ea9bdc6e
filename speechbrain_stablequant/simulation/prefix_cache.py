"""Keeps the results of earlier units while a search changes a later one."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.layer_quant import LayerQuant
from ..model.layer import Cut
from ..utils.patching import hooked, shadowed


class StopForward(Exception):
    """Ends a forward pass once the wanted result is there."""


def _tensors(output: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]


def _half_free(device: torch.device) -> float:
    """Half of a GPU's free bytes with torch's reserve; infinite elsewhere."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    return (free - torch.cuda.memory_allocated(device)) / 2


class Replay:
    """Keeps the result at one cut for every batch, if memory allows."""

    def __init__(
        self, cuts: Iterable[Cut], units: Iterable[str], limit_bytes: int
    ):
        self.cuts = {cut.unit: cut for cut in cuts}
        self.units = list(units)
        self.limit_bytes = limit_bytes
        self._cut: Cut | None = None
        self._prefix: Mapping[str, Any] = {}
        self._kept: list[Any] = []
        self._shapes: dict[nn.Module, list[Any]] = {}
        self._batch = 0
        self._too_large: set[str] = set()

    def start_batch(self, index: int) -> None:
        self._batch = index

    def holds(self, unit: str) -> bool:
        return self._cut is not None and self._cut.unit == unit

    def drop(self) -> None:
        self._cut, self._prefix = None, {}
        self._kept, self._shapes = [], {}

    def _can_start_from(
        self, unit: str, prefix: Mapping[str, tuple[str, LayerQuant]]
    ) -> bool:
        """Whether the kept results lie before ``unit`` on the same prefix."""
        if self._cut is None:
            return False
        here = self.units.index(self._cut.unit)
        there = self.units.index(unit)
        before = set(self.units[:here])
        earlier = {n: row for n, row in prefix.items() if row[0] in before}
        return here <= there and earlier == self._prefix

    def prepare(
        self,
        unit: str,
        prefix: Mapping[str, tuple[str, LayerQuant]],
        forward: Callable[[Callable[[int], None]], None],
    ) -> bool:
        """Keeps the results before a unit; False: run the whole model, because
        there is no cut or they are too large.

        ``forward`` runs all batches: it calls its argument with the index
        before each, and goes to the next one at :class:`StopForward`.
        """
        cut = self.cuts.get(unit)
        if cut is None or unit in self._too_large:
            return False
        if self._cut is cut and self._prefix == prefix:
            return True
        if not self._can_start_from(unit, prefix):
            self.drop()
        kept: list[Any] = []
        shapes: dict[nn.Module, list[Any]] = {m: [] for m in cut.skip}
        size, limit = 0, None

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            nonlocal size, limit
            tensors = _tensors(output)
            if limit is None:
                limit = min(self.limit_bytes, _half_free(tensors[0].device))
            size += sum(tensor.nbytes for tensor in tensors)
            if size > limit:
                raise _TooLarge
            kept.append(output)
            raise StopForward

        def note_shape(module: nn.Module, args: tuple, output: Any) -> None:
            blank = tree_map_only(torch.Tensor, lambda t: t.to("meta"), output)
            shapes[module].append(blank)

        hooks = [(cut.module, keep), *((m, note_shape) for m in cut.skip)]
        try:
            with hooked(hooks, after=True), self.active():
                forward(self.start_batch)
        except (_TooLarge, torch.OutOfMemoryError):
            kept.clear()
            self._too_large.add(unit)
            self.drop()
            return False
        self._cut, self._prefix = cut, dict(prefix)
        self._kept, self._shapes = kept, shapes
        return True

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the kept results replace what came before."""
        if self._cut is None:
            yield
            return

        def blank(module: nn.Module) -> Any:
            # Never read: the cut's result replaces everything that would be
            # computed from it. Only the shape matters.
            shape = self._shapes[module][self._batch]
            device = _tensors(self._kept[self._batch])[0].device
            empty = partial(torch.empty_like, device=device)
            return tree_map_only(torch.Tensor, empty, shape)

        results = {self._cut.module: lambda: self._kept[self._batch]}
        results |= {m: partial(blank, m) for m in self._cut.skip}
        with ExitStack() as stack:
            for module, result in results.items():
                forward = partial(_constant, result)
                stack.enter_context(shadowed(module, "forward", forward))
            yield


def _constant(result: Callable[[], Any], *_: Any, **__: Any) -> Any:
    """A forward that ignores its arguments."""
    return result()


class _TooLarge(Exception):
    """The results to keep exceed the limit."""
