"""Checks of what the recipe computes, most of them before a search.

On one batch with the recovered checkpoint: the runtime, the inference folder
and the recipe's decoding. On the test set, after its float evaluation: the
decoding, the characters that the labels can write, and the WER.
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import speechbrain as sb
import torch

from ..core.error_rates import score
from ..folder.write import RecognizerSource
from ..methods.registry import QuantizeConfig
from ..methods.search import check_float_wer
from ..utils.typed import one_line
from .coverage import check_references
from .data import TestSet
from .decoding import FolderDecoder, difference
from .describe import describe_recognizer
from .metrics import Row, rows_of, transcripts_of
from .passes import evaluation_steps
from .run import Run
from .run_runtime import change_runtime, try_descriptions, try_probe
from .tokenizer import describe_tokenizer, find_tokenizer

logger = logging.getLogger(__name__)

_Text = tuple[str, ...]


class RecipeChecks:
    """Checks the recipe, and reports findings at once."""

    def __init__(
        self, brain: sb.Brain, config: QuantizeConfig, runs: Sequence[Run]
    ):
        self.brain = brain
        self.config = config
        self.runs = runs
        self._decoder: FolderDecoder | None = None

    def try_out(self, test: TestSet) -> None:
        """Try runtimes, folders and decoding on a batch of a test set."""
        # The recipe's own evaluation must not see other random numbers.
        with torch.random.fork_rng():
            batch = test.first_batch()
            for run in self.runs:
                self._try_descriptions(run, batch)
            sources = [run.source for run in self.runs if run.source]
            if sources:
                self._try_decoder(batch, sources[0])
            self._try_probes()

    def _try_descriptions(self, run: Run, batch: Any) -> None:
        """Describe what the runtime and the inference folder compute."""
        backend, said = try_descriptions(
            self.brain, batch, run.config, run.backend
        )
        change_runtime(run, backend, [])
        for warning in said:
            self._warn([run], warning)
        names = [layer.name for layer in run.layers]
        try:
            run.source = describe_recognizer(
                self.brain, batch, run.config, names
            )
        except Exception as error:
            # A recipe without an inference folder is still evaluated.
            reason = one_line(error)
            self._warn(
                [run],
                f"No inference folder (EncoderASR cannot load it): {reason}.",
            )

    def _try_probes(self) -> None:
        """Check each distinct runtime against its probe."""
        tried: dict[tuple, tuple[str, list[str]]] = {}
        for run in self.runs:
            key = (
                run.backend,
                repr(run.config.backend_options),
                run.config.weight_bits,
                run.config.activation_bits,
                *(layer.name for layer in run.layers),
            )
            if key in tried:
                change_runtime(run, *tried[key])
            else:
                reasons = try_probe(run)
                tried[key] = (run.backend, reasons)

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
            with decoder.listening(self.brain) as texts:
                ((_, metric, _),) = evaluation_steps(
                    self.brain, [batch], sb.Stage.TEST, attribute
                )
        except Exception as error:
            # The recipe's own evaluation comes next, and raises the same.
            logger.debug("quantize: no batch in the TEST stage: %s", error)
            return
        self.compare(metric, texts, self.runs)
        # Checked again on the whole set, which has more words.
        self._check_references(rows_of(metric), "the test set")

    def listening(self) -> AbstractContextManager[list[_Text]]:
        """Transcribe batches with the folder's decoder, if there is one."""
        if self._decoder is None:
            return nullcontext([])
        return self._decoder.listening(self.brain)

    def compare(
        self, metric: Any, texts: Sequence[_Text], runs: Sequence[Run]
    ) -> list[_Text]:
        """Warn if recipe and folder decode differently; return the folder's
        transcripts, with spaces where the recipe has them."""
        if self._decoder is None or len(texts) != len(metric.scores):
            return []
        rows = rows_of(metric)
        texts = self._decoder.respelled(rows, texts)
        *_, content = describe_tokenizer(self._decoder.tokenizer)
        for run in self.runs:
            if run.source is not None:
                run.source = replace(run.source, tokenizer=content)
        said = difference(rows, texts)
        if said is not None:
            described = [run for run in runs if run.source is not None]
            self._warn(described, said, once=said.partition(":")[0])
        return texts

    def check_baseline(
        self, metric: Any, texts: Sequence[_Text], name: str
    ) -> list[_Text]:
        """Check the float evaluation of a test set; return the folder's texts.

        Refuses references that the labels cannot write and a WER that is too
        high, but only while a search is still ahead.
        """
        texts = self.compare(metric, texts, self.runs)
        where = f"test set '{name}'"
        try:
            wer = score(transcripts_of(metric)).wer
        except ValueError as error:
            raise ValueError(f"quantize: {where}: {error}") from error
        first = all(run.plan is None for run in self.runs)
        self._check_references(rows_of(metric), where, first)
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
        warning = check_references(rows, tokenizer, where, limit)
        if warning is not None:
            self._warn(self.runs, warning, once="Of the words of")

    def _warn(
        self, runs: Iterable[Run], warning: str, once: str | None = None
    ) -> None:
        """Log a warning, and add it to the reports of runs that have none
        which begins with ``once``."""
        for run in runs:
            if once and any(w.startswith(once) for w in run.warnings):
                continue
            if not any(warning in other.warnings for other in self.runs):
                logger.warning("quantize: %s", warning)
            run.warnings.append(warning)
