"""StableQuant attached to a Brain: fit, evaluate, and the report."""

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ..config import QuantizeConfig
from ..report.results import Evaluation, SetResult
from ..utils import distributed
from ..utils.interrupts import explained
from ..utils.lock import FolderLock
from ..utils.outputs import Outputs
from ..utils.patching import shadowed
from ..utils.store import Store
from .before_search import BeforeSearch
from .block import read_block, run_configs
from .clock import ForwardClock
from .data import dataset_of
from .dependencies import Dependencies
from .environment import environment
from .evaluation import QuantizedEvaluator, evaluation_of
from .metrics import metric_of
from .preflight import check_checkpoint, check_setting, choose_runtime
from .quantize import Quantizer
from .run import Run, compare
from .subsets import check_set_audio, draw_subsets, make_trainer
from .test_set import TestSet
from .trainer import BrainTrainer

logger = logging.getLogger(__name__)


def _unwrap(brain: sb.Brain) -> None:
    """Unwrap the modules of a distributed training."""
    for key, module in brain.modules.items():
        if isinstance(module, DistributedDataParallel):
            brain.modules[key] = module.module


class StableQuant:
    """Quantizes a Brain's recognizer in its own evaluation.

    The first ``evaluate`` of the Brain lets the recipe recover its checkpoint
    and evaluate the float model as ever; then it calibrates and searches on
    the validation set, and evaluates the test set once more, quantized. Later
    calls do both evaluations for their own set. The report grows with each.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's Brain.
    config : QuantizeConfig
        The validated block.
    valid_set : Dataset or DataLoader, optional
        For calibration and search; without it, the one given to ``fit``.
    train_set : Dataset or DataLoader, optional
        For methods that train; without it, the one given to ``fit``.
    """

    def __init__(
        self,
        brain: sb.Brain,
        config: QuantizeConfig,
        valid_set: Dataset | DataLoader | None = None,
        train_set: Dataset | DataLoader | None = None,
    ):
        self.brain = brain
        self.config = config
        #: Of this process; the folder of the first process is the one kept.
        self.folder = distributed.own_folder(check_setting(brain, config))
        self.store = Store(self.folder)
        self._lock = FolderLock(self.folder, "quantize.output_folder")
        self._outputs = Outputs()
        self.runs = [
            Run(
                name,
                variant,
                self.folder / name,
                self.store.below(name),
                *choose_runtime(brain, variant),
            )
            for name, variant in run_configs(config, brain.debug).items()
        ]
        for warning in dict.fromkeys(w for r in self.runs for w in r.warnings):
            logger.warning("quantize: %s", warning)
        #: Whether a recipe's block made it; then errors may end the process.
        self.by_block = False
        self._before = BeforeSearch(brain, config, self.runs)
        self._recovered: tuple | None = None
        self._trainer: BrainTrainer | None = None
        self._dependencies: Dependencies | None = None
        if valid_set is not None:
            draw_subsets(brain, config, self.runs, valid_set, {})
        if train_set is not None:
            self._trainer = make_trainer(
                brain, config, self.runs, train_set, {}
            )
        # Shadowed on the instance: also right for a Brain that overrides them.
        self._fit, self._evaluate = brain.fit, brain.evaluate
        brain.fit = self.fit
        brain.evaluate = self.evaluate
        brain.stablequant = self

    @classmethod
    def attach(
        cls,
        brain: sb.Brain,
        valid_set: Dataset | DataLoader | None = None,
        train_set: Dataset | DataLoader | None = None,
        **block: Any,
    ) -> "StableQuant":
        """Attach to a Brain from Python, without any global hook.

        Arguments
        ---------
        brain : sb.Brain
            The recipe's Brain.
        valid_set : Dataset or DataLoader, optional
            For calibration and search; without it, the one given to ``fit``.
        train_set : Dataset or DataLoader, optional
            For methods that train; without it, the one given to ``fit``.
        **block
            Keys of :class:`~speechbrain_stablequant.config.QuantizeConfig`.

        Returns
        -------
        StableQuant
            After ``brain.evaluate``, its ``runs`` hold plans and results.
        """
        config = read_block(block)
        return cls(brain, config, valid_set, train_set)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.brain.modules.items())

    @distributed.loss_in_one_line()
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """``Brain.fit``; keeps the data sets for the quantization.

        Arguments
        ---------
        *args, **kwargs
            As of ``Brain.fit``.
        """
        with explained(
            "start the same command again, and the training goes on from the "
            "recipe's last checkpoint",
            self.by_block,
        ):
            return self._fit_and_keep(*args, **kwargs)

    def _fit_and_keep(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(self._fit).bind(*args, **kwargs).arguments
        self._trainer = make_trainer(
            self.brain,
            self.config,
            self.runs,
            call.get("train_set"),
            call.get("train_loader_kwargs") or {},
        )
        self._check_metric_early()
        valid_set = call.get("valid_set")
        if valid_set is not None and self._needs_data:
            options = call.get("valid_loader_kwargs") or {}
            draw_subsets(self.brain, self.config, self.runs, valid_set, options)
        self._lock_folder()
        try:
            return self._fit(*args, **kwargs)
        except BaseException:
            self._lock.release()
            raise

    @property
    def _needs_data(self) -> bool:
        return any(run.config.plan is None for run in self.runs)

    def _lock_folder(self) -> None:
        """Keep other runs out of the folder until the next evaluation ends."""
        # Of several processes only the first one writes there.
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()

    @distributed.loss_in_one_line()
    def evaluate(
        self,
        test_set: Dataset | DataLoader,
        max_key: str | None = None,
        min_key: str | None = None,
        progressbar: bool | None = None,
        test_loader_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """``Brain.evaluate``, of the float and of the quantized model.

        Arguments
        ---------
        test_set, max_key, min_key, progressbar, test_loader_kwargs
            As of ``Brain.evaluate``.

        Returns
        -------
        float
            What the float evaluation returns.

        Raises
        ------
        FileNotFoundError
            The Brain has a checkpointer that finds no checkpoint.
        ValueError
            No validation set, bad audio, bad metric attribute.
        """
        with explained(
            "start the same command again to go on; what is finished is kept "
            f"in {self.folder}",
            self.by_block,
        ):
            try:
                _unwrap(self.brain)
                test = self._check_test_set(test_set, test_loader_kwargs or {})
                self._check_metric()
                self._lock_folder()
                loss, baseline = self._evaluate_float(
                    test, max_key, min_key, progressbar
                )
                self._evaluate_runs(test, baseline)
                return loss
            finally:
                self._lock.release()

    def _check_test_set(
        self, test_set: Dataset | DataLoader, options: Mapping[str, Any]
    ) -> TestSet:
        """Name and check a test set before it is evaluated."""
        if self._needs_data:
            self._require_subsets()
        test = TestSet(self.brain, test_set, dict(options), self._set_name())
        if len(test_set) == 0:
            raise ValueError(
                f"quantize: the test set '{test.name}' is empty; evaluate() "
                "needs at least one utterance"
            )
        check_set_audio(self.brain, self.config, dataset_of(test_set))
        return test

    def _require_subsets(self) -> None:
        if not self.runs[0].subsets:
            raise ValueError(
                "quantize.calibration: no validation set; the recipe's fit() "
                "got none, so give one to StableQuant.attach(brain, "
                "valid_set=...) or set quantize.plan"
            )
        if self._trainer is None:
            self._trainer = make_trainer(
                self.brain, self.config, self.runs, None, {}
            )

    def _set_name(self) -> str:
        """Name of a test set: of the recipe's WER file, else a number."""
        path = getattr(self.brain.hparams, "test_wer_file", None)
        name = Path(str(path)).stem.removeprefix("wer_") if path else "test"
        unique, number = name, 1
        while unique in self.runs[0].results:
            number += 1
            unique = f"{name}-{number}"
        return unique

    def _check_metric(self) -> None:
        if self.runs[0].results:
            return
        self.brain.on_stage_start(sb.Stage.VALID, epoch=None)
        metric_of(self.brain, self.config.metric_attribute)

    def _check_metric_early(self) -> None:
        """Check the metric before a training, if the recipe has it by then."""
        try:
            self.brain.on_stage_start(sb.Stage.VALID, epoch=None)
        except Exception as error:
            # Some recipes prepare this in their training.
            logger.debug("quantize: metric not checked yet: %s", error)
            return
        metric_of(self.brain, self.config.metric_attribute)

    def _evaluate_float(
        self,
        test: TestSet,
        max_key: str | None,
        min_key: str | None,
        progressbar: bool | None,
    ) -> tuple[Any, Evaluation]:
        """The recipe's own evaluation: its loss and its transcripts."""
        config, texts = self.config, []
        clock = ForwardClock(self.brain, config.signal, config.sample_rate)

        def on_evaluate_start(max_key=None, min_key=None) -> None:
            if self._recover_once(recover, max_key, min_key):
                self._try_out(test)
            # Trials are not part of the float model's time.
            stack.enter_context(clock.running())
            texts.append(stack.enter_context(self._before.listening()))

        recover = self.brain.on_evaluate_start
        with (
            shadowed(self.brain, "on_evaluate_start", on_evaluate_start),
            ExitStack() as stack,
        ):
            loss = self._evaluate(
                test.data,
                max_key=max_key,
                min_key=min_key,
                progressbar=progressbar,
                # Brain.evaluate changes its argument.
                test_loader_kwargs=dict(test.options),
            )
        metric = metric_of(self.brain, config.metric_attribute)
        heard = self._before.check_baseline(metric, texts[-1], test.name)
        return loss, evaluation_of(metric, clock, heard)

    def _recover_once(
        self, recover: Callable, max_key: str | None, min_key: str | None
    ) -> bool:
        """Recover the checkpoint; returns whether this is the first time."""
        keys = (max_key, min_key)
        if self._recovered is None:
            if self.config.require_checkpoint:
                check_checkpoint(self.brain, max_key, min_key)
            recover(max_key=max_key, min_key=min_key)
            self._recovered = keys
            return True
        if self._recovered != keys:
            raise ValueError(
                "quantize: evaluate() was called with max_key, min_key "
                f"= {keys} after {self._recovered}; the plan belongs to "
                "one checkpoint, so evaluate others in a run of their own"
            )
        return False

    def _try_out(self, test: TestSet) -> None:
        """Try on one batch what will be executed and written."""
        # The recipe's own evaluation must not see other random numbers.
        with torch.random.fork_rng():
            self._before.try_batch(test.first_batch())
            self._before.try_runtimes()

    def _evaluate_runs(self, test: TestSet, baseline: Evaluation) -> None:
        """Quantize and evaluate each run, and write the reports."""
        brain, config, outputs = self.brain, self.config, self._outputs
        if self._dependencies is None:
            parts = (self._modules[key] for key in config.target)
            layers = [layer for part in parts for layer in part.modules()]
            self._dependencies = Dependencies(brain, layers)
        quantizer = Quantizer(
            brain,
            config,
            self.store,
            outputs,
            self._trainer,
            self._dependencies,
        )
        evaluator = QuantizedEvaluator(
            brain, config, self._before, outputs, self._dependencies
        )
        kept = vars(brain).copy()
        for run in self.runs:
            if run.plan is None:
                quantizer.quantize(run)
            quantized = evaluator.evaluate(run, baseline, test)
            run.results[test.name] = SetResult.pair(baseline, quantized)
            if distributed.is_main():
                found = environment(str(brain.device), brain.eval_precision)
                run.write_report(self._modules, found, outputs)
        # The Brain's metrics remain those of its own evaluation.
        vars(brain).update(kept)
        if len(self.runs) > 1 and distributed.is_main():
            with outputs.writing():
                compare(self.runs, self._modules, self.folder)
        self.store.flush()
        outputs.check()
