"""A SpeechBrain Brain with its data, as a recognizer to quantize."""

import copy
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any

import speechbrain as sb
import torch
from torch import nn

from ..methods.search import Score
from ..methods.session.trainer import Trainer
from ..simulation.prefix_cache import StopForward
from ..utils import distributed
from ..utils.distributed import from_main, gathered
from ..utils.files import identity
from ..utils.store import Store
from .data import Batches, dataset_of
from .dependencies import Dependencies, dataset_digest
from .metrics import metric_of
from .trace import Kind

# Processes sum their word errors after this many batches.
_TOGETHER = 8


class BrainRecognizer:
    """A Brain with its ``calibration`` and ``search`` sets.

    Implements :class:`~speechbrain_stablequant.methods.session.Recognizer`.
    """

    def __init__(
        self,
        brain: sb.Brain,
        subsets: Mapping[str, Batches],
        metric_attribute: str,
        show_progress: bool,
        trainer: Trainer | None = None,
        dependencies: Dependencies | None = None,
    ):
        self.brain = brain
        self.subsets = dict(subsets)
        self.metric_attribute = metric_attribute
        self.show_progress = show_progress
        self.trainer = trainer
        self.dependencies = dependencies or Dependencies(brain, ())
        self._keys: dict[tuple[str, Kind], str] = {}

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The Brain's modules by key."""
        return dict(self.brain.modules.items())

    def ids(self, subset: str) -> list[str]:
        """Utterances of a subset, in evaluation order."""
        return self.subsets[subset].ids

    def key(self, subset: str, kind: Kind) -> str:
        """Key of a measurement on a subset, without weights."""
        if (subset, kind) not in self._keys:
            batches, stage = self.subsets[subset], sb.Stage.VALID
            first = batches.load()[0]
            reads = self.dependencies.reads(first, stage)[kind]
            content = [
                self.dependencies.key(first, stage, kind),
                batches.digest(reads.batch),
            ]
            self._keys[subset, kind] = identity(content)
        return self._keys[subset, kind]

    def training_key(self, store: Store) -> str:
        """Key of a training, without weights."""
        trainer = self.trainer
        content = [
            trainer.ids,
            dict(trainer.settings),
            dataset_digest(dataset_of(trainer.train_set), store),
            self.dependencies.training_key(),
        ]
        return from_main(identity(content))

    def lengths(self, subset: str, batch: int) -> tuple[int, list[int]]:
        """Samples of a padded batch, and of each of its utterances."""
        return self.subsets[subset].lengths(batch)

    @torch.no_grad()
    def forward(
        self,
        subset: str,
        before_batch: Callable[[int], None],
        first_only: bool = False,
        turns: int = 1,
    ) -> torch.Tensor | None:
        """Run ``compute_forward`` over a subset, each batch ``turns`` times.

        Returns the first tensor of the last output; None if a hook stopped it.
        """
        self.brain.modules.eval()
        output = None
        for index, batch in enumerate(self.subsets[subset].load()):
            for _ in range(turns):
                before_batch(index)
                try:
                    output = self._compute(batch)
                except StopForward:
                    output = None
            if first_only:
                break
        return first_tensor(output)

    @torch.no_grad()
    def outputs(
        self, subset: str, before_batch: Callable[[int], None]
    ) -> Iterator[torch.Tensor | None]:
        """Yield the first tensor of each batch's output, if there is one."""
        self.brain.modules.eval()
        for index, batch in enumerate(self.subsets[subset].load()):
            before_batch(index)
            yield first_tensor(self._compute(batch))

    def _compute(self, batch: Any) -> Any:
        with self.brain.evaluation_ctx:
            return self.brain.compute_forward(
                copy.copy(batch), stage=sb.Stage.VALID
            )

    def score(
        self,
        before_batch: Callable[[int], None],
        give_up_above: int | None,
        only: Sequence[int] | None = None,
    ) -> Score:
        """Measure the word errors of the search set, in the VALID stage.

        Stops once they exceed ``give_up_above``; ``only``: batch indices.
        """
        subset = self.subsets["search"]
        batches, places = subset.load(), list(subset.places)
        if only is not None:
            batches = [batches[index] for index in only]
            places = [places[index] for index in only]
        measured, errors = [], 0
        steps = evaluation_steps(
            self.brain,
            batches,
            sb.Stage.VALID,
            self.metric_attribute,
            before_batch,
        )
        for index, (loss, metric, size) in enumerate(steps, start=1):
            rows = metric.scores[len(metric.scores) - size :]
            edits = [row["num_edits"] for row in rows]
            words = [row["num_ref_tokens"] for row in rows]
            measured.append((places[index - 1], edits, words, loss))
            errors += sum(edits)
            if (
                give_up_above is not None
                and _in_all(errors, index, subset.rounds) > give_up_above
            ):
                break
        return _score(measured, len(measured) == len(batches))


def _in_all(errors: int, done: int, rounds: int) -> int:
    """Errors of all processes; 0 in rounds in which they are not summed.

    All processes must stop after the same round. Summing synchronizes them, so
    it is done every few rounds, and not in the last one, where some processes
    have no batch.
    """
    if distributed.size() == 1:
        return errors
    if done % _TOGETHER or done == rounds:
        return 0
    return sum(gathered(errors))


def _score(
    measured: list[tuple[int, list[int], list[int], float]], complete: bool
) -> Score:
    """Join the measurements of all processes.

    Each batch has its place, its errors and words by utterance, and its loss.
    """
    parts = gathered((measured, complete))
    complete = all(done for _, done in parts)
    rows = sorted(row for part, _ in parts for row in part)
    errors = [n for _, edits, _, _ in rows for n in edits]
    words = [n for _, _, counts, _ in rows for n in counts]
    if sum(words) == 0:
        raise ValueError("search set: the transcripts hold no word")
    loss_sum = 0.0
    for _, edits, _, loss in rows:
        loss_sum += loss * len(edits)
    total = sum(errors), sum(words), loss_sum / len(errors)
    if not complete:
        return Score(*total, complete)
    losses = [float(f"{loss:.7g}") for _, _, _, loss in rows]
    return Score(*total, complete, *map(tuple, (errors, words, losses)))


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
        loss = brain.evaluate_batch(copy.copy(batch), stage=stage)
        yield float(loss), metric, len(metric.scores) - before


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first tensor in a nested output of ``compute_forward``."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        for part in output:
            found = first_tensor(part)
            if found is not None:
                return found
    return None
