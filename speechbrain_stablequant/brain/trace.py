"""Logs which attributes a recipe reads while it evaluates one batch.

Reads after the last call of a layer (a decoder's) cannot change the layers'
inputs.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import speechbrain as sb
import torch
from torch import nn

from ..utils.patching import shadowed

#: What is measured: inputs of layers, outputs of ``compute_forward``, or word
#: errors and losses.
Kind = Literal["inputs", "outputs", "scores"]
# The objects that a recipe reads from.
_PLACES = ("brain", "hparams", "batch")
# Attributes that belong to SpeechBrain's Brain, or are attached by us.
BRAIN_INTERNALS = {
    *inspect.unwrap(sb.Brain.__init__).__code__.co_names,
    "fit",
    "evaluate",
    "stablequant",
}
# These read all tensors, but only to move them.
_MOVES = ("to", "pin_memory")


@dataclass(frozen=True)
class Reads:
    """Names of the attributes that were read; None: any may have been."""

    brain: frozenset[str] | None
    hparams: frozenset[str] | None
    batch: frozenset[str] | None


@dataclass
class _Log:
    """Reads in order."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    #: Objects that cannot be watched.
    blind: set[str] = field(default_factory=set)
    silent: bool = False

    def read(self, place: str, name: str) -> None:
        if not self.silent:
            self.rows.append((place, name))

    def reads(self, start: int, end: int, own: set[str]) -> Reads:
        """Reads in a span of rows; of the Brain's attributes only ``own``."""
        found = {}
        for place in _PLACES:
            names = {x for where, x in self.rows[start:end] if where == place}
            everything = place in self.blind or "__dict__" in names
            found[place] = None if everything else frozenset(names)
        brain = found.pop("brain")
        brain = frozenset(own if brain is None else brain & own)
        return Reads(brain, **found)


def _watching(kind: type, place: str, log: _Log) -> type:
    """Subclass of ``kind`` that logs the reads of attributes."""

    class Watching(kind):
        def __getattribute__(self, name: str) -> Any:
            log.read(place, name)
            found = super().__getattribute__(name)
            return _silently(found, log) if name in _MOVES else found

    Watching.__name__, Watching.__qualname__ = kind.__name__, kind.__qualname__
    Watching.__module__ = kind.__module__
    return Watching


def _silently(function: Callable, log: _Log) -> Callable:
    """Wrap a function to log nothing that it reads."""

    def call(*args: Any, **kwargs: Any) -> Any:
        log.silent = True
        try:
            return function(*args, **kwargs)
        finally:
            log.silent = False

    return call


@contextmanager
def _watched(owner: Any, place: str, log: _Log) -> Iterator[None]:
    """Log the reads of an object's attributes."""
    kind = type(owner)
    try:
        owner.__class__ = _watching(kind, place, log)
    except TypeError:
        log.blind.add(place)  # Such as a dictionary.
        yield
        return
    try:
        yield
    finally:
        owner.__class__ = kind


@contextmanager
def _watched_hparams(brain: sb.Brain, log: _Log) -> Iterator[None]:
    """Log the reads of hparams; a SimpleNamespace cannot change its class."""
    original = vars(brain).get("hparams")
    if type(original) is not SimpleNamespace:
        log.blind.add("hparams")
        yield
        return
    kind = _watching(SimpleNamespace, "hparams", log)
    watched = kind(**vars(original))
    try:
        with shadowed(brain, "hparams", watched):
            yield
    finally:
        # Keep what the recipe has set meanwhile.
        vars(original).clear()
        vars(original).update(vars(watched))


@torch.no_grad()
def trace(
    brain: sb.Brain,
    batch: Any,
    stage: sb.Stage,
    layers: Collection[nn.Module],
) -> dict[Kind, Reads]:
    """Evaluate one batch and return the reads that each kind depends on."""
    log, last, forward_end = _Log(), 0, 0
    before = vars(brain).copy()
    batch = copy.copy(batch)
    compute_forward = brain.compute_forward

    def called(*_: Any) -> None:
        nonlocal last
        last = len(log.rows)

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal forward_end
        result = compute_forward(*args, **kwargs)
        forward_end = len(log.rows)
        return result

    brain.modules.eval()
    with ExitStack() as stack:
        stack.enter_context(shadowed(brain, "compute_forward", timed_forward))
        for module in layers:
            stack.enter_context(module.register_forward_hook(called))
        stack.enter_context(_watched(batch, "batch", log))
        stack.enter_context(_watched_hparams(brain, log))
        stack.enter_context(_watched(brain, "brain", log))
        brain.on_stage_start(stage, epoch=None)
        start = len(log.rows)
        brain.evaluate_batch(batch, stage=stage)
        end = len(log.rows)
    # Attributes created during the evaluation (metrics) are no inputs.
    own = {k for k, v in before.items() if vars(brain).get(k) is v}
    own -= BRAIN_INTERNALS
    spans = {
        "inputs": (start, last or forward_end),
        "outputs": (start, forward_end),
        "scores": (0, end),
    }
    return {kind: log.reads(*span, own) for kind, span in spans.items()}
