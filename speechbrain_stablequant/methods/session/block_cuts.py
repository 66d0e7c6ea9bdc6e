"""Where a forward pass of any model can resume: behind a block.

A block is a unit of several layers. What follows may read more than its output
(a decoder's blocks read the encoder's), so each place is tried on one batch;
where it fails, a pass resumes at the last place before.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from posixpath import commonpath

import torch
from torch import nn

from ...model.layers import Cut, Layer
from ...model.products import modules_by_name
from ...simulation.prefix_cache import Replay
from ..search.score import BeforeBatch
from .protocols import Recognizer

logger = logging.getLogger(__name__)


def block_cuts(
    recognizer: Recognizer,
    units: Mapping[str, Sequence[Layer]],
    limit_bytes: int,
) -> list[Cut]:
    """Cuts before units, from the first block that a pass can resume behind."""
    by_name = modules_by_name(recognizer.modules)
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
                expected = _outputs(recognizer, lambda _: None)
            trial = Replay([cut], list(units), limit_bytes)
            if _is_exact(recognizer, trial, following, expected):
                found.append(cut)
                before.append(block)
                continue
        if found:
            found.append(Cut(following, found[-1].module, found[-1].skip))
        before += [layer.module for layer in layers]
    return found


def _is_exact(
    recognizer: Recognizer,
    trial: Replay,
    unit: str,
    expected: Sequence[torch.Tensor],
) -> bool:
    """Whether a resumed pass over the first batch has the same outputs."""
    forward = partial(recognizer.forward, "calibration", first_only=True)
    try:
        if not trial.prepare(unit, {}, forward):
            return False
        with trial.active():
            again = _outputs(recognizer, trial.start_batch)
    except Exception as error:
        # A guess: the model may read anything of what is skipped.
        logger.debug("search: no resuming at %s: %s", unit, error)
        return False
    same = zip(expected, again, strict=True)
    return bool(expected) and all(torch.equal(*pair) for pair in same)


def _outputs(
    recognizer: Recognizer, before_batch: BeforeBatch
) -> Sequence[torch.Tensor]:
    output = next(iter(recognizer.outputs("calibration", before_batch)))
    return [output] if isinstance(output, torch.Tensor) else output
