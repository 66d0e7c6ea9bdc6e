"""Evaluates a test set with the quantized model of a run."""

import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import speechbrain as sb
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..config import QuantizeConfig
from ..report.results import Evaluation
from ..runtimes.registry import code_digest
from ..utils import distributed
from ..utils.files import write_atomic
from ..utils.outputs import Outputs
from .before_search import BeforeSearch
from .clock import ForwardClock
from .decoding import as_scored, same_text
from .dependencies import Dependencies
from .environment import environment
from .metrics import (
    join_metric,
    join_rows,
    metric_of,
    rows_of,
    transcripts_of,
)
from .recognizer import evaluation_steps
from .run import Run
from .test_set import TestSet


def evaluation_of(
    metric: Any, clock: ForwardClock, texts: Sequence[tuple[str, ...]] = ()
) -> Evaluation:
    """An evaluation from a metric, a clock, and the folder's transcripts."""
    transcripts, rows = transcripts_of(metric), rows_of(metric)
    folder = ()
    if len(texts) == len(rows) and not same_text(rows, texts):
        pairs = zip(transcripts, as_scored(rows, texts), strict=True)
        folder = tuple(replace(t, hypothesis=text) for t, text in pairs)
    return Evaluation(
        transcripts,
        clock.seconds,
        clock.audio_seconds,
        folder,
        clock.audio_digest,
    )


class QuantizedEvaluator:
    """Evaluates test sets with the quantized models, in the TEST stage.

    What an earlier run has evaluated under the same key is read from disk.
    """

    def __init__(
        self,
        brain: sb.Brain,
        config: QuantizeConfig,
        before: BeforeSearch,
        outputs: Outputs,
        dependencies: Dependencies,
    ):
        self.brain = brain
        self.config = config
        self.before = before
        self.outputs = outputs
        self.dependencies = dependencies

    def evaluate(
        self, run: Run, baseline: Evaluation, test: TestSet
    ) -> Evaluation:
        """Evaluate a test set as the run's plan says."""
        file = f"transcripts_{test.name}.json"
        # One batch shows what is read during recognition and scoring.
        decoding = self.dependencies.key(
            test.first_batch(), sb.Stage.TEST, "scores"
        )
        key = self._key(run, baseline, decoding)
        known = distributed.from_main(Evaluation.read(run.store, file, key))
        if known is not None:
            return known
        loader = test.loader()
        modules, device = dict(self.brain.modules.items()), self.brain.device
        clock = ForwardClock(
            self.brain, self.config.signal, self.config.sample_rate
        )
        with (
            run.as_stored(modules),
            run.executed(modules, str(device)),
            clock.running(),
            self.before.listening() as texts,
        ):
            if key != self._key(run, baseline, decoding):
                # Another runtime than expected executes the plan.
                key = self._key(run, baseline, decoding)
                known = distributed.from_main(
                    Evaluation.read(run.store, file, key)
                )
                if known is not None:
                    return known
            counts = self._recognize(run, loader, test.name)
        metric = metric_of(self.brain, self.config.metric_attribute)
        texts = join_rows(texts, counts)
        join_metric(metric, counts)
        self._write_errors(run, metric, test.name)
        heard = self.before.compare(metric, texts, [run])
        evaluation = evaluation_of(metric, clock, heard)
        evaluation.write(run.store, file, key)
        return evaluation

    def _recognize(self, run: Run, loader: DataLoader, name: str) -> list[int]:
        """Evaluate this process's batches; return utterances per batch."""
        total = len(loader)
        if self.brain.debug:
            total = min(total, self.brain.debug_batches)
        mine = distributed.share(total)
        steps = evaluation_steps(
            self.brain,
            islice(loader, mine.start, mine.stop, mine.step),
            sb.Stage.TEST,
            self.config.metric_attribute,
        )
        bar = tqdm(
            steps,
            f"{name}, quantized {run.name}".strip(),
            len(mine),
            dynamic_ncols=True,
            disable=not distributed.is_main() or self.brain.noprogressbar,
        )
        return [count for _, _, count in bar]

    def _write_errors(self, run: Run, metric: Any, name: str) -> None:
        """Write SpeechBrain's word error file of a test set."""
        metric.summarize()
        text = io.StringIO()
        metric.write_stats(text)
        with self.outputs.writing():
            write_atomic(run.folder / f"wer_{name}.txt", text.getvalue())

    def _key(self, run: Run, baseline: Evaluation, decoding: str) -> str:
        """Key of the transcripts and times of an evaluation."""
        how = [decoding, run.backend, run.config.float_dtype, *run.warnings]
        how.append(repr(run.config.backend_options))
        how += [
            environment(str(self.brain.device), self.brain.eval_precision),
            code_digest(),
        ]
        return baseline.key(run.plan, *how)
