"""StableQuant attached to a Brain, in place of its fit and evaluate.

By a line of Python, or by a recipe's ``quantize:`` block without any change of
its script.
"""

import functools
import inspect
import logging
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import speechbrain as sb
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ..config import ConfigError
from ..methods.registry import QuantizeConfig
from ..utils import distributed
from ..utils.interrupts import explained
from ..utils.lock import FolderLock
from ..utils.one_line_errors import end_in_one_line
from .block import read_block
from .checks import check_setting
from .data import TestSet, check_set_audio, dataset_of, draw_subsets
from .evaluation import Evaluator
from .metrics import metric_of
from .trainer import BrainTrainer

logger = logging.getLogger(__name__)


class StableQuant:
    """Quantizes a Brain's recognizer in its own evaluation.

    The first ``evaluate`` of the Brain lets the recipe recover its checkpoint
    and evaluate the float model as ever; then it calibrates and searches on
    the validation set, and evaluates the test set once more, quantized. Later
    calls do both evaluations for their own set. The report grows with each.

    Arguments
    ---------
    brain, valid_set, train_set
        As of :meth:`attach`.
    config : QuantizeConfig
        The validated block.
    """

    def __init__(
        self,
        brain: sb.Brain,
        config: QuantizeConfig,
        valid_set: Dataset | DataLoader | None = None,
        train_set: Dataset | DataLoader | None = None,
    ):
        if not hasattr(brain, "hparams"):
            # A Brain that was made without any has no such attribute.
            brain.hparams = SimpleNamespace()
        self.brain = brain
        self.config = config
        #: Of this process; the folder of the first process is the one kept.
        self.folder = distributed.own_folder(check_setting(brain, config))
        self._lock = FolderLock(self.folder, "quantize.output_folder")
        self._evaluator = Evaluator(brain, config, self.folder)
        self.runs = self._evaluator.runs
        #: Whether a recipe's block made it; then errors may end the process.
        self.by_block = False
        #: Sets given here take precedence over those of ``fit``.
        self._has_valid_set = valid_set is not None
        self._has_train_set = train_set is not None
        if self._has_valid_set:
            self._draw_subsets(valid_set, {})
        if self._has_train_set:
            self._make_trainer(train_set, {})
        # On the instance, which takes precedence over the recipe's class.
        self._fit = brain.fit
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
            Keys of :class:`~speechbrain_stablequant.QuantizeConfig`.

        Returns
        -------
        StableQuant
            After ``brain.evaluate``, its ``runs`` hold plans and results.
        """
        return cls(brain, read_block(block), valid_set, train_set)

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
            call = inspect.signature(self._fit).bind(*args, **kwargs).arguments
            if not self._has_train_set:
                options = call.get("train_loader_kwargs") or {}
                self._make_trainer(call.get("train_set"), options)
            self._check_metric_early()
            valid_set = call.get("valid_set")
            draws = self._needs_data and not self._has_valid_set
            if draws and valid_set is not None:
                options = call.get("valid_loader_kwargs") or {}
                self._draw_subsets(valid_set, options)
            self._lock_folder()
            try:
                return self._fit(*args, **kwargs)
            except BaseException:
                self._lock.release()
                raise

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
            "start the same command again; it goes on from what "
            f"{self.folder} holds",
            self.by_block,
        ):
            try:
                for key, module in self.brain.modules.items():
                    if isinstance(module, DistributedDataParallel):
                        self.brain.modules[key] = module.module
                test = self._check_test_set(test_set, test_loader_kwargs or {})
                if not self.runs[0].results:
                    self.brain.on_stage_start(sb.Stage.VALID, epoch=None)
                    metric_of(self.brain, self.config.metric_attribute)
                self._lock_folder()
                return self._evaluator.evaluate(
                    test,
                    max_key=max_key,
                    min_key=min_key,
                    progressbar=progressbar,
                )
            finally:
                self._lock.release()

    @property
    def _needs_data(self) -> bool:
        return any(run.config.plan is None for run in self.runs)

    def _draw_subsets(
        self, valid_set: Dataset | DataLoader, options: Mapping[str, Any]
    ) -> None:
        configs = [run.config for run in self.runs]
        drawn = draw_subsets(self.brain, configs, valid_set, options)
        for run, subsets in zip(self.runs, drawn, strict=True):
            run.subsets = subsets

    def _make_trainer(
        self, train_set: Dataset | DataLoader | None, options: Mapping[str, Any]
    ) -> None:
        """Make a trainer on the training set, if any run's method trains."""
        configs = [run.config for run in self.runs]
        methods = [c.method for c in configs if c.needs_training]
        if not methods:
            return
        if train_set is None or len(dataset_of(train_set)) == 0:
            raise ConfigError(
                f"quantize.method: {methods[0]} trains, and the "
                "recipe's training set is empty; name training data (such as "
                "train_splits) or choose another method"
            )
        self._evaluator.trainer = BrainTrainer(
            self.brain, train_set, options, self.config.signal, self.config.seed
        )

    def _lock_folder(self) -> None:
        """Keep other runs out of the folder until the next evaluation ends."""
        # Of several processes only the first one writes there.
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()

    def _check_test_set(
        self, test_set: Dataset | DataLoader, options: Mapping[str, Any]
    ) -> TestSet:
        """Name and check a test set before it is evaluated."""
        if self._needs_data and not self.runs[0].subsets:
            raise ValueError(
                "quantize.calibration: no validation set; the recipe's fit() "
                "got none, so give one to StableQuant.attach(brain, "
                "valid_set=...) or set quantize.plan"
            )
        if self._needs_data and self._evaluator.trainer is None:
            self._make_trainer(None, {})
        test = TestSet(self.brain, test_set, dict(options), self._set_name())
        dataset = dataset_of(test_set)
        if len(test_set) == 0:
            raise ValueError(
                f"quantize: the test set '{test.name}' is empty; evaluate() "
                "needs at least one utterance"
            )
        check_set_audio(self.brain, self.config, dataset)
        return test

    def _set_name(self) -> str:
        """Name of a test set: of the recipe's WER file, else a number."""
        path = getattr(self.brain.hparams, "test_wer_file", None)
        name = Path(str(path)).stem.removeprefix("wer_") if path else "test"
        names = chain([name], (f"{name}-{i}" for i in count(2)))
        # Of the last variant: an interrupted evaluation is done again.
        return next(x for x in names if x not in self.runs[-1].results)

    def _check_metric_early(self) -> None:
        """Check the metric before a training, if the recipe has it by then."""
        try:
            self.brain.on_stage_start(sb.Stage.VALID, epoch=None)
        except Exception as error:
            # Some recipes prepare this in their training.
            logger.debug("quantize: metric not checked yet: %s", error)
            return
        metric_of(self.brain, self.config.metric_attribute)


def register(**block: Any) -> QuantizeConfig:
    """Validate a ``quantize:`` block and attach it to the recipe's Brain.

    Used as ``quantize: !apply:speechbrain_stablequant.register``. Brains that
    are made later with the returned value in their ``hparams`` are attached;
    all others stay as they are. An error of this package that ends the recipe
    is one line; its traceback is in the recipe's log.

    Arguments
    ---------
    **block
        Keys of :class:`~speechbrain_stablequant.QuantizeConfig`.

    Returns
    -------
    QuantizeConfig
        The value of the key ``quantize``.

    Raises
    ------
    ConfigError
        Names the first wrong key.

    Example
    -------
    >>> register(weight_bits=6, activation_bits=6).method
    'stablequant'
    """
    _hook_brain_init()
    end_in_one_line()
    return read_block(block)


def _hook_brain_init() -> None:
    """Make every new Brain look for a block in its hparams; hooks once."""
    original = sb.Brain.__init__
    if getattr(original, "looks_for_quantize_block", False):
        return

    @functools.wraps(original)
    def init(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # A Brain without hparams has no such attribute.
        hparams = vars(self.hparams) if hasattr(self, "hparams") else {}
        blocks = [v for v in hparams.values() if isinstance(v, QuantizeConfig)]
        if len(blocks) > 1:
            raise ValueError("quantize: the recipe has two quantize blocks")
        if blocks:
            # The experiment's folder was made meanwhile, with a hook.
            end_in_one_line()
            StableQuant(self, blocks[0]).by_block = True

    init.looks_for_quantize_block = True
    sb.Brain.__init__ = init
