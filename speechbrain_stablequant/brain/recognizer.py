"""A SpeechBrain Brain with its data, as a recognizer to quantize."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import speechbrain as sb
import torch
from torch import nn

from ..methods.search.score import Score
from ..methods.session.protocols import Trainer
from ..simulation.prefix_cache import StopForward
from ..utils import distributed
from ..utils.distributed import from_main, gathered
from ..utils.files import identity
from ..utils.patching import shadowed
from ..utils.store import Store
from ..utils.typed import one_line
from .data import Batches, dataset_of
from .dependencies import Dependencies, Kind, dataset_digest
from .loggers import log_search
from .metrics import objects_of, rate_of
from .passes import (
    decoding_each_time,
    evaluation_steps,
    first_tensor,
    recognize,
    tensors,
)
from .recipe_chain import SEARCHERS

logger = logging.getLogger(__name__)

# Rows of outputs kept of a batch: the joint network of a transducer has one for
# each frame and token.
_MOST_VALUES = 1 << 23


# Of a set that ranks, where the encoder takes most of the time.
_RANKING = 8
# Processes sum their word errors after this many batches.
_TOGETHER = 8


class TeacherForcing:
    """Keeps the searchers of a Brain from decoding.

    ``batch``: tried in the VALID stage, to see whether it calls any.
    """

    def __init__(self, brain: sb.Brain, batch: Any):
        self.brain = brain
        self._called = False
        self._searchers = searchers(brain)
        if self._searchers:
            self._try(batch)
        #: Whether the Brain decodes token by token.
        self.autoregressive = self._called

    def _try(self, batch: Any) -> None:
        try:
            output = self.recognize(batch)
        except Exception as error:
            if not self._called:
                raise
            logger.warning(
                "quantize: the recipe reads what it decodes (%s), so each pass "
                "of the search decodes, which takes longer",
                one_line(error),
            )
            self._searchers = []
            return
        if self._called and not compared_outputs(output):
            logger.warning(
                "quantize: the recipe computes no probabilities of the "
                "reference's tokens, so each pass of the search decodes"
            )
            self._searchers, self._called = [], False

    def recognize(self, batch: Any) -> Any:
        """The output of ``compute_forward`` in the VALID stage."""
        with ExitStack() as stack:
            for searcher in self._searchers:
                nothing = shadowed(searcher, "forward", self._nothing)
                stack.enter_context(nothing)
            stack.enter_context(decoding_each_time(self.brain))
            return recognize(self.brain, batch)

    def _nothing(self, states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        """What searchers return, without a token for any utterance."""
        self._called = True
        empty = torch.zeros(len(states), 1)
        return [[] for _ in states], empty, empty, empty


def searchers(brain: sb.Brain) -> list[nn.Module]:
    """What decodes token by token for a Brain, with what it holds."""
    modules = getattr(brain, "modules", None) or {}
    found = [*(value for _, value in objects_of(brain)), *modules.values()]
    known = {id(x): x for x in found if isinstance(x, SEARCHERS)}
    return list(known.values())


def compared_outputs(output: Any) -> list[torch.Tensor]:
    """Each tensor of an output with a row for each frame or token, [rows,
    labels]; of a large one every so many rows. Logits of a joint network, of
    frames and tokens, become log probabilities."""
    found = []
    for x in tensors(output):
        if x.dim() > 2 and x.is_floating_point():
            rows = x.reshape(-1, x.shape[-1])
            rows = rows[:: max(1, -(-rows.numel() // _MOST_VALUES))]
            rows = rows.float()
            found.append(rows.log_softmax(-1) if x.dim() > 3 else rows)
    return found


@dataclass(eq=False)
class BrainRecognizer:
    """A Brain with its ``calibration`` and ``search`` sets.

    Implements the protocol of ``methods.session.protocols``.
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
        if limit >= 0:  # others are no evaluations but trials of one batch
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
