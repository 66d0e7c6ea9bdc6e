"""What is tried and compared before a search begins.

On one batch, when the checkpoint is there: the runtime, the inference folder,
and how the recipe decodes. On the whole test set, when the float model has
been evaluated: how it decodes, what its labels can write, and whether it
recognizes anything at all.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import speechbrain as sb

from ..config import QuantizeConfig
from ..core.error_rates import score
from ..folder.write import RecognizerSource
from ..methods.search import check_float_wer
from .decoding import (
    FolderDecoder,
    Row,
    describe_tokenizer,
    difference,
    find_tokenizer,
    rows_of,
)
from .dry_run import transcribe_batch
from .preflight import check_references, describe_folder, try_runtime
from .recognizer import transcripts_of
from .run import Run

logger = logging.getLogger(__name__)

_Text = tuple[str, ...]


class BeforeSearch:
    """Tries and compares, and says what it finds at once.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's Brain.
    config : QuantizeConfig
        The block that all runs share.
    runs : sequence of Run
        Their runtimes, sources and warnings are filled in.
    """

    def __init__(
        self, brain: sb.Brain, config: QuantizeConfig, runs: Sequence[Run]
    ):
        self.brain = brain
        self.config = config
        self.runs = runs
        self._decoder: FolderDecoder | None = None

    def try_batch(self, batch: Any) -> None:
        """Tries on one batch what will be executed and written.

        Arguments
        ---------
        batch : PaddedBatch
            Of the first test set; the checkpoint is recovered.

        Raises
        ------
        ValueError
            A runtime that the block names computes something else, or the
            labels cannot write the transcripts.
        """
        for run in self.runs:
            backend, said = try_runtime(
                self.brain, batch, run.config, run.backend
            )
            run.change_runtime(backend, [])
            self._say(run, said)
            run.source, said = describe_folder(self.brain, batch, run.config)
            self._say(run, said)
        sources = [run.source for run in self.runs if run.source is not None]
        if sources:
            self._try_decoder(batch, sources[0])

    def _try_decoder(self, batch: Any, source: RecognizerSource) -> None:
        decoder = FolderDecoder(
            self.brain.modules[source.keys[-1]],
            find_tokenizer(self.brain),
            source.blank_index,
            self.config.signal,
        )
        self._decoder = decoder
        attribute = self.config.metric_attribute
        try:
            metric, texts = transcribe_batch(
                self.brain, batch, attribute, decoder
            )
        except Exception as error:
            # The recipe's own evaluation comes next, and says what it is.
            logger.debug("quantize: no batch in the TEST stage: %s", error)
            return
        self.compare(metric, texts, self.runs)
        # What a few words leave open is counted on the whole set.
        self._check_references(rows_of(metric.scores), "the test set")

    @contextmanager
    def listening(self) -> Iterator[list[_Text]]:
        """Context in which the folder's decoder hears what the Brain
        computes.

        Yields
        ------
        list of tuple of str
            Labels of each utterance; stays empty without a folder.
        """
        if self._decoder is None:
            yield []
            return
        with self._decoder.listening(self.brain) as texts:
            yield texts

    def compare(
        self, metric: Any, texts: Sequence[_Text], runs: Sequence[Run]
    ) -> list[_Text]:
        """Says in which utterance a recipe decodes otherwise than its folder.

        Arguments
        ---------
        metric : ErrorRateStats
            What the recipe has scored.
        texts : sequence of tuple of str
            What the folder's decoder has heard of the same utterances.
        runs : sequence of Run
            Those whose reports say it.

        Returns
        -------
        list of tuple of str
            The folder's transcripts, with spaces where the recipe has them.
        """
        if self._decoder is None or len(texts) != len(metric.scores):
            return []
        rows = rows_of(metric.scores)
        texts = self._decoder.respelled(rows, texts)
        self._spell_sources()
        said = difference(rows, texts)
        for run in runs:
            if said is not None and run.source is not None:
                self._say(run, [said], said[: said.index(":")])
        return texts

    def _spell_sources(self) -> None:
        """The folders get the decoder's tokenizer."""
        *_, content = describe_tokenizer(self._decoder.tokenizer)
        for run in self.runs:
            if run.source is not None:
                run.source = replace(run.source, tokenizer=content)

    def check_baseline(
        self, metric: Any, texts: Sequence[_Text], name: str
    ) -> list[_Text]:
        """Checks the float model's evaluation of a test set.

        Arguments
        ---------
        metric : ErrorRateStats
            What the recipe has scored.
        texts : sequence of tuple of str
            What the folder's decoder has heard.
        name : str
            The test set.

        Returns
        -------
        list of tuple of str
            The folder's transcripts.

        Raises
        ------
        ValueError
            No words, words that the labels cannot write, or a float model
            that recognizes too little; of the first set alone, since after
            it there is nothing to search.
        """
        texts = self.compare(metric, texts, self.runs)
        where = f"test set '{name}'"
        try:
            wer = score(transcripts_of(metric)).wer
        except ValueError as error:
            raise ValueError(f"quantize: {where}: {error}") from error
        first = all(run.plan is None for run in self.runs)
        self._check_references(rows_of(metric.scores), where, first)
        if first:
            check_float_wer(wer, where, self._limit)
        return texts

    @property
    def _limit(self) -> float:
        return max(run.config.search.max_float_wer for run in self.runs)

    def _check_references(
        self, rows: Sequence[Row], where: str, refuse: bool = True
    ) -> None:
        limit = self._limit if refuse else 100.0
        tokenizer = find_tokenizer(self.brain)
        for warning in check_references(rows, tokenizer, where, limit):
            for run in self.runs:
                self._say(run, [warning], "Of the words of")

    def _say(self, run: Run, warnings: Sequence[str], once: str = "") -> None:
        """Puts warnings into a run's report, and says them now."""
        for warning in warnings:
            if once and any(w.startswith(once) for w in run.warnings):
                continue
            if not any(warning in other.warnings for other in self.runs):
                logger.warning("quantize: %s", warning)
            run.warnings.append(warning)
