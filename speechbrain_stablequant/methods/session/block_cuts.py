"""Where a forward pass of any model can resume: behind a block.

A block is a unit of several layers. What follows may read more than its output
(a decoder's blocks read the encoder's), so each place is tried on one batch;
where it fails, a pass resumes at the last place before.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from posixpath import commonpath
from typing import Any

import torch
from torch import nn

from ...model.layer import Cut, Layer
from ...model.products import modules_by_name
from ...simulation.prefix_cache import Replay
from ...utils.patching import hooked
from ..search.score import BeforeBatch, Score

logger = logging.getLogger(__name__)

#: Runs the first batch up to a hook that stops it.
Forward = Callable[[BeforeBatch], Any]
#: Runs the batches and yields the output of each.
Outputs = Callable[[BeforeBatch], Iterator[Any]]
#: Scores the search set until there are more errors than given.
ScoreSearchSet = Callable[[BeforeBatch, int | None], Score]


def block_cuts(
    modules: Mapping[str, nn.Module],
    units: Mapping[str, Sequence[Layer]],
    forward: Forward,
    outputs: Outputs,
    limit_bytes: int,
) -> list[Cut]:
    """Cuts before units, from the first block that a pass can resume behind."""
    by_name = modules_by_name(modules)
    found: list[Cut] = []
    before: list[nn.Module] = []
    expected: Sequence[torch.Tensor] | None = None
    for unit, following in pairwise(units):
        layers = units[unit]
        paths = [layer.name.replace(".", "/") for layer in layers]
        block = by_name.get(commonpath(paths).replace("/", "."))
        if len(layers) > 1 and block is not None:
            cut = Cut(following, block, tuple(before))
            if expected is None:
                expected = _first(outputs, lambda _: None)
            trial = Replay([cut], units, limit_bytes)
            if _is_exact(trial, following, forward, outputs, expected):
                found.append(cut)
                before.append(block)
                continue
        if found:
            found.append(Cut(following, found[-1].module, found[-1].skip))
        before += [layer.module for layer in layers]
    return found


def called_once(cuts: Sequence[Cut], score: ScoreSearchSet) -> list[Cut]:
    """Cuts where a pass that decodes token by token can resume: one result is
    kept of a batch, and a decoder gives one for each token. Behind a decoder
    such a pass resumes at the last place before it."""
    if not cuts:
        return []
    calls: Counter[nn.Module] = Counter()
    modules = {module for cut in cuts for module in (cut.module, *cut.skip)}
    with hooked((x, lambda called, _: calls.update([called])) for x in modules):
        score(lambda _: None, -1)  # ends after one batch
    found: list[Cut] = []
    for cut in cuts:
        if calls[cut.module] == 1 and all(calls[x] < 2 for x in cut.skip):
            found.append(cut)
        elif found:
            found.append(Cut(cut.unit, found[-1].module, found[-1].skip))
    return found


def _is_exact(
    trial: Replay,
    unit: str,
    forward: Forward,
    outputs: Outputs,
    expected: Sequence[torch.Tensor],
) -> bool:
    """Whether a resumed pass over the first batch has the same outputs."""
    try:
        if not trial.prepare(unit, {}, forward):
            return False
        with trial.active():
            again = _first(outputs, trial.start_batch)
    except Exception as error:
        # A guess: the model may read anything of what is skipped.
        logger.debug("search: no resuming at %s: %s", unit, error)
        return False
    same = zip(expected, again, strict=True)
    return bool(expected) and all(torch.equal(*pair) for pair in same)


def _first(
    outputs: Outputs, before_batch: BeforeBatch
) -> Sequence[torch.Tensor]:
    output = next(iter(outputs(before_batch)))
    return [output] if isinstance(output, torch.Tensor) else output
