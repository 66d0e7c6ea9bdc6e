"""What happens between ``brain.evaluate`` and the report, from top to bottom.

On the first call the recipe recovers its checkpoint, and what the run will need
is tried on one batch. The recipe evaluates its float model. Then each variant
is quantized (a plan, integers, the inference folder), evaluated on the same
test set, and reported.
"""

import io
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch

from ..core.plan import PLAN_FILE
from ..methods.registry import QuantizeConfig, make_plan
from ..methods.session.session import Session
from ..report.comparison import write_comparison
from ..report.results import Evaluation, SetResult, Turns
from ..runtimes.cpu import cpu_class, cpu_name
from ..runtimes.registry import RUNTIMES, code_digest
from ..simulation.multiply_adds import count_multiply_adds
from ..utils import distributed
from ..utils.files import Outputs, write_atomic
from ..utils.patching import restored, shadowed
from ..utils.precision import allows_tf32
from ..utils.progress import progress_bar
from ..utils.store import Store
from .block import run_configs
from .checks import RecipeChecks, check_checkpoint
from .data import TestSet
from .decoding import as_scored, same_text
from .dependencies import Dependencies
from .loggers import log_results
from .metrics import (
    counts_of,
    error_metrics,
    join_metric,
    join_rows,
    metric_of,
    rate_of,
    rows_of,
    transcripts_of,
)
from .passes import FloatTurns, ForwardClock, evaluation_steps
from .recognizer import BrainRecognizer
from .run import Run, comparison
from .run_parts import decide_parts
from .run_runtime import (
    change_runtime,
    choose_runtime,
    executed,
    make_probe,
    try_descriptions,
    try_probes,
)
from .trainer import BrainTrainer

logger = logging.getLogger(__name__)


# SpeechBrain's names of precisions.
_ARITHMETIC = {
    "fp32": "float32",
    "fp16": "autocast to float16",
    "bf16": "autocast to bfloat16",
}


class Evaluator:
    """Evaluates test sets with the float model and with each variant."""

    def __init__(self, brain: sb.Brain, config: QuantizeConfig, folder: Path):
        self.brain = brain
        self.config = config
        self.folder = folder
        self.store = Store(folder)
        self.outputs = Outputs()
        self.runs = [
            Run(
                brain,
                name,
                variant,
                folder / name,
                self.store.below(name),
                *choose_runtime(brain, variant),
            )
            for name, variant in run_configs(config, brain.debug).items()
        ]
        # Runtimes say themselves how they execute a plan.
        simulated = [r for r in self.runs if RUNTIMES[r.backend].simulates]
        for warning in dict.fromkeys(w for r in simulated for w in r.warnings):
            logger.warning("quantize: %s", warning)
        #: The trainer of methods that train.
        self.trainer: BrainTrainer | None = None
        self.checks = RecipeChecks(brain, config, self.runs)
        self._recovered: tuple | None = None
        self._tried_out = False
        # The recipe's own, which ours replaces on the instance.
        self._recipe_evaluate = brain.evaluate

    def evaluate(self, test: TestSet, **options: Any) -> Any:
        """Evaluate a test set; return the loss of the float model.

        ``options`` are those of ``Brain.evaluate``, apart from the loader's.
        """
        loss, baseline = self._evaluate_float(test, options)
        # The Brain's metrics remain those of its own evaluation.
        with restored(self.brain):
            for run in self.runs:
                # An interrupted evaluation said some of them before, and left
                # a plan, but not all that follows from it.
                run.warnings[:] = dict.fromkeys(run.warnings)
                if not run.is_quantized:
                    self._quantize(run)
                quantized = self._evaluate_quantized(run, baseline, test)
                run.results[test.name] = SetResult.pair(baseline, quantized)
                if distributed.is_main() and run.write_report(
                    self._environment, self.outputs
                ):
                    log_results(run, test.name)
        if len(self.runs) > 1 and distributed.is_main():
            with self.outputs.writing():
                write_comparison(comparison(self.runs), self.folder)
        self.store.flush()
        self.outputs.check()
        return loss

    def _evaluate_float(
        self, test: TestSet, options: Mapping[str, Any]
    ) -> tuple[Any, Evaluation]:
        """The recipe's own evaluation: its loss and its transcripts."""
        config, texts = self.config, []
        clock = ForwardClock(self.brain, config.signal, config.sample_rate)
        recover = self.brain.on_evaluate_start

        def on_evaluate_start(max_key=None, min_key=None) -> None:
            self._recover_once(recover, max_key, min_key)
            if not self._tried_out:
                self._try_out(test)
            # Trials are not part of the float model's time.
            stack.enter_context(clock.running())
            texts.append(stack.enter_context(self.checks.listening()))

        with (
            shadowed(self.brain, "on_evaluate_start", on_evaluate_start),
            ExitStack() as stack,
        ):
            if distributed.is_main():
                logger.info("quantize: %s, the float model", test.name)
            loss = self._recipe_evaluate(
                test.data,
                # Brain.evaluate changes its argument.
                test_loader_kwargs=dict(test.options),
                **options,
            )
        metric = metric_of(self.brain, config.metric_attribute)
        heard = self.checks.check_baseline(metric, texts[-1], test.name)
        return loss, self._evaluation(metric, clock, heard)

    def _recover_once(
        self, recover: Callable, max_key: str | None, min_key: str | None
    ) -> None:
        """Recover the checkpoint, the first time."""
        keys = (max_key, min_key)
        if self._recovered is None:
            if self.config.require_checkpoint:
                check_checkpoint(self.brain, *keys)
            recover(max_key=max_key, min_key=min_key)
            self._recovered = keys
        if self._recovered != keys:
            raise ValueError(
                "quantize: evaluate() was called with max_key, min_key "
                f"= {keys} after {self._recovered}; the plan belongs to "
                "one checkpoint, so evaluate others in a run of their own"
            )

    def _try_out(self, test: TestSet) -> None:
        """Try runtimes, folders and decoding on a batch of a test set."""
        if distributed.is_main():
            logger.info(
                "quantize: %s, trying runtimes, folder and decoding on one "
                "batch (a large model takes a minute or more)",
                test.name,
            )
        # The recipe's own evaluation must not see other random numbers.
        with torch.random.fork_rng():
            batch = test.first_batch()
            self.checks.leave_out_idle(batch)
            for run in self.runs:
                backend, said = try_descriptions(
                    self.brain, batch, run.config, run.backend
                )
                change_runtime(run, backend, [])
                for warning in said:
                    self.checks.warn([run], warning)
                decide_parts(run, batch)
            self.checks.try_out(batch)
            try_probes(self.runs)
        self._tried_out = True

    def _quantize(self, run: Run) -> None:
        """Make the run's plan, its integers and its folder."""
        started = time.monotonic()
        with self.outputs.writing():
            run.folder.mkdir(parents=True, exist_ok=True)
        recognizer = BrainRecognizer(
            self.brain,
            run.subsets,
            self.config.metric_attribute,
            distributed.is_main() and not self.brain.noprogressbar,
            self.trainer,
            self._dependencies,
        )
        # The shared store: variants reuse histograms and evaluations.
        session = Session(
            recognizer, run.config, self.store, RUNTIMES, run.weights_alone
        )
        # With the rule of the search that suits the recognizer.
        run.config = session.config
        run.plan, run.histograms = make_plan(session)
        if "calibration" in run.subsets:
            run.products = count_multiply_adds(
                session.layers,
                recognizer.modules,
                lambda: recognizer.forward("calibration", lambda _: None, True),
            )
        run.plan = replace(run.plan, parts=run.parts)
        with self.outputs.writing():
            run.plan.save(run.folder / PLAN_FILE)
        seconds = time.monotonic() - started
        run.convert(session.layers)
        if distributed.is_main():
            with self.outputs.writing():
                run.write_folder()
            if run.probe is None:
                make_probe(run)
        run.source, run.probe = distributed.from_main((run.source, run.probe))
        if run.config.plan is None:
            trained = self.trainer.ids if run.config.needs_training else ()
            run.remember_effort(seconds, trained)
        run.is_quantized = True

    @cached_property
    def _dependencies(self) -> Dependencies:
        """Made before the first variant changes the modules."""
        parts = (self.brain.modules[key] for key in self.config.target)
        layers = [layer for part in parts for layer in part.modules()]
        return Dependencies(self.brain, layers)

    def _evaluate_quantized(
        self, run: Run, baseline: Evaluation, test: TestSet
    ) -> Evaluation:
        """Evaluate a test set as the run's plan says, in the TEST stage.

        What an earlier run has evaluated under the same key is read from disk.
        """
        config, file = self.config, f"transcripts_{test.name}.json"
        # One batch shows what is read during recognition and scoring.
        first = test.first_batch()
        decoding = self._dependencies.key(first, sb.Stage.TEST, "scores")

        def look_up() -> tuple[str, Evaluation | None]:
            key = baseline.key(
                run.plan,
                decoding,
                run.backend,
                run.config.float_dtype,
                *run.warnings,
                repr(run.config.backend_options),
                self._environment,
                code_digest(),
            )
            known = Evaluation.read(run.store, file, key)
            return key, distributed.from_main(known)

        _, known = look_up()
        if known is not None:
            return known
        clock = ForwardClock(self.brain, config.signal, config.sample_rate)
        with (
            run.as_stored(),
            executed(run) as in_float,
            clock.running(),
            self.checks.listening() as texts,
        ):
            # Another runtime than expected may execute the plan.
            key, known = look_up()
            if known is not None:
                return known
            counts, turns = self._recognize(run, test, clock, in_float)
        metric = metric_of(self.brain, config.metric_attribute)
        texts = join_rows(texts, counts)
        for each in error_metrics(self.brain).values():
            join_metric(each, counts)
        self._write_errors(run, metric, test.name)
        heard = self.checks.compare(metric, texts, [run])
        found = self._evaluation(metric, clock, heard)
        evaluation = replace(found, turns=turns)
        evaluation.write(run.store, file, key)
        return evaluation

    def _evaluation(
        self, metric: Any, clock: ForwardClock, heard: Sequence[tuple[str, ...]]
    ) -> Evaluation:
        """What was just evaluated, with all metrics of the Brain."""
        counts = counts_of(self.brain)
        rate = rate_of(self.brain, self.config.metric_attribute)
        found = evaluation_of(metric, clock, heard)
        return replace(found, counts=counts, rate=rate)

    @property
    def _environment(self) -> dict[str, str | int]:
        return environment(str(self.brain.device), self.brain.eval_precision)

    def _recognize(
        self,
        run: Run,
        test: TestSet,
        clock: ForwardClock,
        in_float: Callable[[], AbstractContextManager[None]],
    ) -> tuple[list[int], Turns | None]:
        """Evaluate this process's batches; return utterances per batch, and
        the times of those that the float model recognized, too."""
        loader = test.loader()
        total = len(loader)
        if self.brain.debug:
            total = min(total, self.brain.debug_batches)
        mine = distributed.share(total)
        batches = islice(loader, mine.start, mine.stop, mine.step)
        metric = self.config.metric_attribute
        steps = evaluation_steps(self.brain, batches, sb.Stage.TEST, metric)
        bar = progress_bar(
            steps,
            f"{test.name}, quantized {run.name}".strip(),
            distributed.is_main() and not self.brain.noprogressbar,
            total=len(mine),
        )
        if RUNTIMES[run.backend].simulates:
            return [count for _, _, count in bar], None
        with FloatTurns(clock, len(mine), in_float).running() as turns:
            return [count for _, _, count in bar], turns.times

    def _write_errors(self, run: Run, metric: Any, name: str) -> None:
        """Write SpeechBrain's word error file of a test set."""
        metric.summarize()
        text = io.StringIO()
        metric.write_stats(text)
        with self.outputs.writing():
            write_atomic(run.folder / f"wer_{name}.txt", text.getvalue())


def evaluation_of(
    metric: Any, clock: ForwardClock, texts: Sequence[tuple[str, ...]] = ()
) -> Evaluation:
    """An evaluation from a metric, a clock, and the folder's transcripts."""
    transcripts, rows = transcripts_of(metric), rows_of(metric)
    folder = ()
    if len(texts) == len(rows) and not same_text(rows, texts):
        pairs = zip(transcripts, as_scored(rows, texts), strict=True)
        folder = tuple(replace(t, hypothesis=text) for t, text in pairs)
    return Evaluation(transcripts, folder, clock.audio_digest)


def environment(
    device: str, precision: str | None = None
) -> dict[str, str | int]:
    """Describe a device and SpeechBrain's ``eval_precision`` (default fp32)."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "speechbrain": version("speechbrain"),
        "cpu": cpu_name(),
        "cpu class": cpu_class().name,
        "threads": torch.get_num_threads(),
        "device": device,
        "processes": distributed.size(),
        "float arithmetic": _ARITHMETIC[precision or "fp32"],
    }
    if device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name(device)
        allowed = zip(("products", "convolutions"), allows_tf32(), strict=True)
        found["TF32"] = " and ".join(n for n, yes in allowed if yes) or "off"
        found["CUDA"] = str(torch.version.cuda)
    return found
