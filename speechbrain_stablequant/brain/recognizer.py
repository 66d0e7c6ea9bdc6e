"""A SpeechBrain Brain with its data, seen as a recognizer to quantize."""

import copy
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from itertools import islice, zip_longest
from typing import Any

import speechbrain as sb
import torch
from torch import nn

from ..core.error_rates import Transcript
from ..methods.search import Score
from ..methods.session.trainer import Trainer
from ..simulation.prefix_cache import StopForward
from ..utils import distributed
from ..utils.digest import digest, tensor_digest
from ..utils.distributed import from_main, gathered
from ..utils.files import identity
from ..utils.patching import shadowed
from ..utils.store import Store
from ..utils.timing import BatchTimes
from .data import Batches, audio_of, dataset_of
from .dependencies import Dependencies, Kind, dataset_digest

#: Batches after which processes tell each other how many errors they have.
_TOGETHER = 8


def metric_of(brain: sb.Brain, attribute: str) -> Any:
    """The word error statistics of a Brain.

    Arguments
    ---------
    brain : sb.Brain
        After its ``on_stage_start``.
    attribute : str
        ``quantize.metric_attribute``.

    Returns
    -------
    ErrorRateStats
        SpeechBrain's own.

    Raises
    ------
    ValueError
        The Brain has no such attribute, or it is something else.
    """
    metric = getattr(brain, attribute, None)
    if metric is None or not hasattr(metric, "scores"):
        stats = [
            name
            for name, value in vars(brain).items()
            if hasattr(value, "scores") and hasattr(value, "summarize")
        ]
        raise ValueError(
            f"quantize.metric_attribute: the Brain has no ErrorRateStats "
            f"'{attribute}'; it has {', '.join(stats) or 'none'}"
        )
    return metric


def transcripts_of(metric: Any) -> list[Transcript]:
    """References and hypotheses that a metric has collected.

    Arguments
    ---------
    metric : ErrorRateStats
        SpeechBrain's.

    Returns
    -------
    list of Transcript

    Example
    -------
    >>> metric = sb.utils.metric_stats.ErrorRateStats()
    >>> metric.append(["u1"], [["A", "B"]], [["A", "C"]])
    >>> transcripts_of(metric)[0].hypothesis
    'A B'
    """
    return [
        Transcript(
            str(row["key"]),
            " ".join(str(token) for token in row["ref_tokens"]),
            " ".join(str(token) for token in row["hyp_tokens"] if token != ""),
        )
        for row in metric.scores
    ]


def join_rows(rows: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """What all processes have of their shares of the batches.

    Arguments
    ---------
    rows : sequence
        This process's, one for each utterance.
    counts : sequence of int
        Utterances in each of its batches.

    Returns
    -------
    list
        Of all processes, in the order of the batches.

    Example
    -------
    >>> join_rows(["a", "b", "c"], [2, 1])
    ['a', 'b', 'c']
    """
    mine = iter(rows)
    batches = [list(islice(mine, count)) for count in counts]
    return [
        row
        for turn in zip_longest(*gathered(batches), fillvalue=[])
        for batch in turn
        for row in batch
    ]


def join_metric(metric: Any, counts: Sequence[int]) -> None:
    """Puts what all processes have scored into a metric.

    Arguments
    ---------
    metric : ErrorRateStats
        Of this process's share of the batches.
    counts : sequence of int
        Utterances in each of them.

    Example
    -------
    >>> metric = sb.utils.metric_stats.ErrorRateStats()
    >>> metric.append(["u1", "u2"], [["A"], ["B"]], [["A"], ["C"]])
    >>> join_metric(metric, [1, 1])
    >>> metric.ids
    ['u1', 'u2']
    """
    rows = metric.scores[len(metric.scores) - sum(counts) :]
    metric.scores = join_rows(rows, counts)
    metric.ids = [row["key"] for row in metric.scores]


class ForwardClock:
    """Sums the time that a Brain spends recognizing.

    The first batch is left out where there are others: it loads libraries and
    allocates. So is what a runtime compiles for a length that it meets first.

    Arguments
    ---------
    brain : sb.Brain
        Its ``compute_forward`` is timed: model and decoding, not scoring.
    signal : str
        Attribute of a batch with the audio and its lengths.
    sample_rate : int
        Of the audio, in Hz.
    """

    def __init__(self, brain: sb.Brain, signal: str, sample_rate: int):
        self.brain = brain
        self.signal = signal
        self.sample_rate = sample_rate
        self._times = BatchTimes(self._synchronise)
        self._audio: list[float] = []
        self._digests: list[str] = []

    @property
    def seconds(self) -> float:
        """Of computing."""
        return sum(self._times.counted(self._times.seconds))

    @property
    def audio_seconds(self) -> float:
        """Of the audio that was recognized in this time."""
        return sum(self._times.counted(self._audio))

    @property
    def audio_digest(self) -> str:
        """Identifies the audio, and how it was put into batches."""
        return digest(self._digests)

    @contextmanager
    def running(self) -> Iterator["ForwardClock"]:
        """Context in which the time is taken."""
        inner = self.brain.compute_forward

        def timed(batch: Any, *args: Any, **kwargs: Any) -> Any:
            wavs, relative = audio_of(batch, self.signal)
            samples = float((relative * wavs.shape[1]).sum())
            self._digests.append(tensor_digest(wavs, relative))
            with self._times.batch():
                result = inner(batch, *args, **kwargs)
            self._audio.append(samples / self.sample_rate)
            return result

        with shadowed(self.brain, "compute_forward", timed):
            yield self

    def _synchronise(self) -> None:
        if str(self.brain.device).startswith("cuda"):
            torch.cuda.synchronize()


class BrainRecognizer:
    """A Brain with its calibration and search sets.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's.
    subsets : Mapping
        Batches by name: ``calibration`` and ``search``.
    metric_attribute : str
        Attribute with the word error statistics.
    show_progress : bool
        Whether progress bars are shown.
    trainer : Trainer or None
        Its training loop, for methods that train.
    dependencies : Dependencies or None
        What the recipe reads; found out when it is needed.
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
        """Utterances of a subset, in the order in which they are run."""
        return self.subsets[subset].ids

    def key(self, subset: str, kind: Kind) -> str:
        """Identifies all that a pass over a subset depends on, but weights.

        Arguments
        ---------
        subset : str
            ``calibration`` or ``search``.
        kind : str
            ``inputs`` of layers, ``outputs`` of ``compute_forward``, or
            ``scores``.

        Returns
        -------
        str
        """
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
        """Identifies all that a training depends on, but weights.

        Arguments
        ---------
        store : Store
            Remembers the digests of audio files.

        Returns
        -------
        str
        """
        trainer = self.trainer
        content = [
            trainer.ids,
            dict(trainer.settings),
            dataset_digest(dataset_of(trainer.train_set), store),
            self.dependencies.training_key(),
        ]
        return from_main(identity(content))

    def lengths(self, subset: str, batch: int) -> tuple[int, list[int]]:
        """Samples of a padded batch, real samples of each utterance."""
        return self.subsets[subset].lengths(batch)

    @torch.no_grad()
    def forward(
        self,
        subset: str,
        before_batch: Callable[[int], None],
        first_only: bool = False,
        turns: int = 1,
    ) -> torch.Tensor | None:
        """Runs ``compute_forward`` over a subset.

        Arguments
        ---------
        subset : str
            ``calibration`` or ``search``.
        before_batch : callable
            Called with the index of each batch before it is run.
        first_only : bool
            Whether to stop after the first batch.
        turns : int
            How often each batch is run, one time after the other.

        Returns
        -------
        torch.Tensor or None
            First tensor of the last output; None where a hook stopped it.
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
        """Runs ``compute_forward`` over a subset.

        Arguments
        ---------
        subset : str
            ``calibration`` or ``search``.
        before_batch : callable
            Called with the index of each batch before it is run.

        Yields
        ------
        torch.Tensor or None
            First tensor of each batch's output, such as its log
            probabilities; None where the recipe returns none.
        """
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
        """Measures the Brain on the search subset, in its VALID stage.

        Arguments
        ---------
        before_batch : callable
            Called with the index of each batch before it is run.
        give_up_above : int or None
            Word errors beyond which the rest is left out.
        only : sequence of int or None
            Batches to measure on; all by default.

        Returns
        -------
        Score
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
    """Errors of all processes, as far as all know of them.

    Either all stop after the same round of batches or none does. Asking means
    waiting, so they ask every few rounds, and not after the last one, in which
    some have no batch.
    """
    if distributed.size() == 1:
        return errors
    if done % _TOGETHER or done == rounds:
        return 0
    return sum(gathered(errors))


def _score(
    measured: list[tuple[int, list[int], list[int], float]], complete: bool
) -> Score:
    """What all processes have measured: of each batch its place, its errors
    and words by utterance, and its loss."""
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
    """Evaluates batch by batch, without the end of the stage.

    ``on_stage_end`` anneals learning rates, logs and saves checkpoints, so
    it is not called.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's.
    batches : iterable
        The batches.
    stage : sb.Stage
        VALID or TEST.
    metric_attribute : str
        Attribute with the word error statistics.
    before_batch : callable
        Called with the index of each batch before it is run.

    Yields
    ------
    float
        Loss of the batch.
    ErrorRateStats
        With all utterances so far.
    int
        Utterances of the batch.
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
    """The first tensor of what ``compute_forward`` gives.

    Arguments
    ---------
    output : Any
        A tensor, or lists, tuples and dicts that hold some.

    Returns
    -------
    torch.Tensor or None

    Example
    -------
    >>> first_tensor((None, {"a": torch.ones(1)}))
    tensor([1.])
    """
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
