"""Passes of a Brain over batches, which leave the batches as they are."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import speechbrain as sb
import torch

from ..utils.patching import shadowed
from .metrics import metric_of


@torch.no_grad()
def recognize(brain: sb.Brain, batch: Any) -> Any:
    """The output of ``compute_forward`` in the VALID stage."""
    brain.modules.eval()
    with brain.evaluation_ctx:
        return brain.compute_forward(copy.copy(batch), stage=sb.Stage.VALID)


@contextmanager
def decoding_each_time(brain: sb.Brain) -> Iterator[None]:
    """Context in which a recipe decodes its validation set in each epoch."""
    hparams, key = getattr(brain, "hparams", None), "valid_search_interval"
    if not hasattr(hparams, key):
        yield
        return
    with shadowed(hparams, key, 1):
        yield


@torch.no_grad()
def evaluation_steps(
    brain: sb.Brain,
    batches: Iterable[Any],
    stage: sb.Stage,
    metric_attribute: str,
    before_batch: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[float, Any, int]]:
    """Evaluate batches; yield each one's loss, the metric, and its utterances.

    Does not call ``on_stage_end``, which anneals learning rates, logs and
    saves checkpoints.
    """
    brain.on_stage_start(stage, epoch=None)
    brain.modules.eval()
    metric = metric_of(brain, metric_attribute)
    for index, batch in enumerate(batches):
        before_batch(index)
        before = len(metric.scores)
        with decoding_each_time(brain):
            loss = brain.evaluate_batch(copy.copy(batch), stage=stage)
        yield float(loss), metric, len(metric.scores) - before


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in a nested output of ``compute_forward``."""
    if isinstance(output, torch.Tensor):
        yield output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        for part in output:
            yield from tensors(part)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first of :func:`tensors`, if any."""
    return next(tensors(output), None)
