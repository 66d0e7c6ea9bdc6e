"""A SpeechBrain Brain with its data, as a recognizer to quantize."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import speechbrain as sb
import torch
from torch import nn

from ..methods.search.score import Score
from ..methods.session.recognizer import Trainer
from ..simulation.prefix_cache import StopForward
from ..utils import distributed
from ..utils.distributed import from_main, gathered
from ..utils.files import identity
from ..utils.store import Store
from .data import Batches, dataset_of
from .dependencies import Dependencies, Kind, dataset_digest
from .loggers import log_search
from .metrics import rate_of
from .passes import evaluation_steps, first_tensor, tensors
from .teacher_forcing import TeacherForcing, compared_outputs

# Of a set that ranks, where the encoder takes most of the time.
_RANKING = 8
# Processes sum their word errors after this many batches.
_TOGETHER = 8


@dataclass(eq=False)
class BrainRecognizer:
    """A Brain with its ``calibration`` and ``search`` sets.

    Implements the protocol of ``methods.session.recognizer``.
    """

    brain: sb.Brain
    subsets: Mapping[str, Batches]
    metric_attribute: str
    show_progress: bool
    trainer: Trainer | None = None
    dependencies: Dependencies | None = None
    _keys: dict[tuple[str, Kind], str] = field(default_factory=dict)
    _evaluations: int = 0

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The Brain's modules by key."""
        return dict(self.brain.modules.items())

    @property
    def rate(self) -> str:
        """What the recipe's metric counts, such as WER."""
        return rate_of(self.brain, self.metric_attribute)

    @cached_property
    def _teacher(self) -> TeacherForcing:
        return TeacherForcing(self.brain, self.subsets["calibration"].load()[0])

    @property
    def autoregressive(self) -> bool:
        """Whether the Brain decodes token by token."""
        return self._teacher.autoregressive

    @cached_property
    def ranked(self) -> str:
        """The subset by whose outputs candidates are ranked."""
        search = self.subsets.get("search")
        if not self.autoregressive or search is None:
            return "search"
        part = search.drawn(_RANKING)
        if part.count < distributed.size():
            return "search"
        self.subsets = {**self.subsets, "ranking": part}
        return "ranking"

    def ids(self, subset: str) -> list[str]:
        """Utterances of a subset, in evaluation order."""
        return self.subsets[subset].ids

    def key(self, subset: str, kind: Kind) -> str:
        """Key of a measurement on a subset, without weights."""
        if (subset, kind) not in self._keys:
            batches, stage = self.subsets[subset], sb.Stage.VALID
            first = batches.load()[0]
            reads = self.dependencies.reads(first, stage)[kind]
            key = self.dependencies.key(first, stage, kind)
            content = [key, batches.digest(reads.batch)]
            if self.autoregressive and kind != "scores":
                content.append("teacher forcing")
            self._keys[subset, kind] = identity(content)
        return self._keys[subset, kind]

    def training_key(self, store: Store) -> str:
        """Key of a training, without weights."""
        trainer = self.trainer
        content = [
            trainer.ids,
            trainer.settings,
            dataset_digest(dataset_of(trainer.train_set), store),
            self.dependencies.training_key(),
        ]
        return from_main(identity(content))

    def lengths(self, subset: str, batch: int) -> tuple[int, list[int]]:
        """Samples of a padded batch, and of each of its utterances."""
        return self.subsets[subset].lengths(batch)

    def forward(
        self,
        subset: str,
        before_batch: Callable[[int], None],
        first_only: bool = False,
        turns: int = 1,
    ) -> torch.Tensor | None:
        """Run over a subset, each batch ``turns`` times; return the first
        tensor of the last output, None if a hook stopped it."""
        output = None
        for index, batch in enumerate(self.subsets[subset].load()):
            for _ in range(turns):
                before_batch(index)
                try:
                    output = self._teacher.recognize(batch)
                except StopForward:
                    output = None
            if first_only:
                break
        return first_tensor(output)

    def outputs(
        self, subset: str, before_batch: Callable[[int], None]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the first tensor of each batch's output, if there is one; of
        a Brain that decodes token by token all that have a row for each."""
        for index, batch in enumerate(self.subsets[subset].load()):
            before_batch(index)
            output = self._teacher.recognize(batch)
            if self.autoregressive:
                yield compared_outputs(output)
            else:
                yield [*itertools.islice(tensors(output), 1)]

    def score(
        self, before_batch: Callable[[int], None], give_up_above: int | None
    ) -> Score:
        """Measure the word errors of the search set, in the VALID stage.

        Stops once they exceed ``give_up_above``.
        """
        subset = self.subsets["search"]
        limit = math.inf if give_up_above is None else give_up_above
        measured, errors = [], 0
        steps = evaluation_steps(
            self.brain,
            subset.load(),
            sb.Stage.VALID,
            self.metric_attribute,
            before_batch,
        )
        pairs = zip(subset.places, steps, strict=True)
        for place, (loss, metric, size) in pairs:
            rows = metric.scores[len(metric.scores) - size :]
            edits = [row["num_edits"] for row in rows]
            words = [row["num_ref_tokens"] for row in rows]
            measured.append((place, edits, words, loss))
            errors += sum(edits)
            if limit < math.inf and (
                _in_all(errors, len(measured), subset.rounds) > limit
            ):
                break
        found = _score(measured, subset.count, limit)
        self._evaluations += 1
        if found.complete:
            log_search(self.brain, self._evaluations, found)
        return found


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
    measured: list[tuple[int, list[int], list[int], float]],
    count: int,
    limit: float,
) -> Score:
    """Join the measurements of all processes; ``count``: batches of the set.

    Each batch has its place, its errors and words by utterance, and its loss.
    Those after the first that exceeds the limit are left out: one process stops
    there, and several notice later.
    """
    rows = sorted(row for part in gathered(measured) for row in part)
    totals = itertools.accumulate(sum(edits) for _, edits, _, _ in rows)
    rows = rows[: 1 + sum(total <= limit for total in totals)]
    complete = len(rows) == count
    errors = [n for _, edits, _, _ in rows for n in edits]
    words = [n for _, _, counts, _ in rows for n in counts]
    if not words:
        raise ValueError(
            "search set: the recipe's metric counts nothing in the VALID stage"
        )
    if complete and sum(words) == 0:
        raise ValueError("search set: the transcripts hold no word")
    loss_sum = 0.0
    for _, edits, _, loss in rows:
        loss_sum += loss * len(edits)
    losses = [float(f"{loss:.7g}") for _, _, _, loss in rows]
    parts = map(tuple, (errors, words, losses) if complete else ())
    # Too many errors may come before the first word.
    counted = max(sum(words), 1)
    return Score(sum(errors), counted, loss_sum / len(errors), complete, *parts)
