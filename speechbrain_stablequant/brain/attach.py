"""StableQuant in the life of a Brain: fit, evaluate, report.

``register`` makes a ``quantize:`` block of an unedited recipe do it;
``StableQuant.attach`` does the same in one line of Python.
"""

import functools
import inspect
import io
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..config import ConfigError, QuantizeConfig
from ..core.integer_layer import integer_layer
from ..folder.stored_floats import stored_layer
from ..folder.weights_file import PLAN_FILE
from ..folder.write import write_folder
from ..methods import make_plan
from ..methods.session import Session
from ..model.layers import Layer, find_layers, min_samples
from ..report.results import Evaluation, SetResult, environment
from ..rivals.chain_graph import require_one
from ..rivals.nncf_ import make_rival
from ..runtimes.registry import code_digest, runtimes_with
from ..utils import distributed
from ..utils.files import write_atomic
from ..utils.interrupts import explained
from ..utils.lock import FolderLock
from ..utils.outputs import Outputs
from ..utils.patching import shadowed
from ..utils.store import Store
from .audio import check_audio
from .before_search import BeforeSearch
from .block import read_block, variant_configs
from .data import Batches, dataset_of, draw_subset, utterance_ids
from .dependencies import Dependencies
from .describe import find_chain
from .preflight import check_checkpoint, check_setting, choose_runtime
from .recognizer import (
    BrainRecognizer,
    ForwardClock,
    evaluation_steps,
    join_metric,
    join_rows,
    metric_of,
)
from .run import Run, write_comparison
from .trainer import BrainTrainer

logger = logging.getLogger(__name__)

# At most this many utterances where the block does not say.
DEFAULT_UTTERANCES = {"calibration": 128, "search": 256}


def register(**block: Any) -> QuantizeConfig:
    """Turns a ``quantize:`` block into what the recipe's Brain will do.

    Used as ``quantize: !apply:speechbrain_stablequant.register``. The block
    is validated at once. Brains that are made afterwards with this value in
    their ``hparams`` are attached; all others stay as they are.

    Arguments
    ---------
    **block
        Keys of :class:`~speechbrain_stablequant.config.QuantizeConfig`.

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
    return read_block(block)


def _hook_brain_init() -> None:
    """Lets every new Brain look for a block among its hparams, once."""
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
            StableQuant(self, blocks[0]).by_block = True

    init.looks_for_quantize_block = True
    sb.Brain.__init__ = init


def _check_shares(name: str, utterances: int, batch_size: int) -> None:
    """Raises unless each process has a batch of a set."""
    batches = -(-utterances // batch_size)
    if batches < distributed.size():
        raise ConfigError(
            f"quantize.{name}: {batches} batch(es) for {distributed.size()} "
            "processes; start fewer, or give them more utterances"
        )


def _configs(
    brain: sb.Brain, config: QuantizeConfig
) -> dict[str, QuantizeConfig]:
    """Of each run; after two batches of training any WER is as it should be."""
    found = variant_configs(config)
    if not brain.debug:
        return found
    return {
        name: replace(
            variant, search=replace(variant.search, max_float_wer=inf)
        )
        for name, variant in found.items()
    }


def _unwrap(brain: sb.Brain) -> None:
    """Takes back the modules that a distributed training has wrapped."""
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
        #: Of this process: the first one's is the one that stays.
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
            for name, variant in _configs(brain, config).items()
        ]
        for warning in dict.fromkeys(w for r in self.runs for w in r.warnings):
            logger.warning("quantize: %s", warning)
        #: Whether a block of a recipe made it: then the process is its own.
        self.by_block = False
        self._before = BeforeSearch(brain, config, self.runs)
        self._recovered: tuple | None = None
        self._trainer: BrainTrainer | None = None
        self._dependencies: Dependencies | None = None
        if valid_set is not None:
            self._take_valid_set(valid_set, {})
        if train_set is not None:
            self._take_train_set(train_set, {})
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
        """Attaches to a Brain from Python, without any global hook.

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
            After ``brain.evaluate`` the plan and the results of each of its
            ``runs`` are there.
        """
        config = read_block(block)
        return cls(brain, config, valid_set, train_set)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.brain.modules.items())

    # -- data --------------------------------------------------------------

    def _check_audio(self, dataset: Dataset) -> None:
        config = self.config
        check_audio(
            dataset,
            config.audio,
            config.signal,
            config.sample_rate,
            min_samples(self._modules),
        )

    def _take_valid_set(
        self,
        valid_set: Dataset | DataLoader,
        loader_options: Mapping[str, Any],
    ) -> None:
        """Draws and checks the calibration and search sets of each run."""
        dataset = dataset_of(valid_set)
        if isinstance(valid_set, DataLoader):
            loader_options = {"collate_fn": valid_set.collate_fn}
        # Equal sets hold their audio once.
        drawn: dict[tuple, Batches] = {}
        for run in self.runs:
            for name in ("calibration", "search"):
                if name == "search" and not run.config.needs_search:
                    continue
                subset = self._draw(dataset, run.config, name)
                size = getattr(run.config, name).batch_size
                key = (tuple(utterance_ids(subset)), size)
                if key not in drawn:
                    self._check_audio(subset)
                    drawn[key] = Batches(
                        subset, size, loader_options, self.config.signal
                    )
                    _check_shares(name, len(subset), size)
                run.subsets[name] = drawn[key]

    def _draw(
        self, dataset: Dataset, config: QuantizeConfig, name: str
    ) -> Dataset:
        part = getattr(config, name)
        count, most = part.num_utterances, DEFAULT_UTTERANCES[name]
        if self.brain.debug:
            most = self.brain.debug_batches * part.batch_size
            count = None
        return draw_subset(dataset, count, most, config.seed, name)

    def _take_train_set(
        self,
        train_set: Dataset | DataLoader | None,
        loader_options: Mapping[str, Any],
    ) -> None:
        """Keeps the training set for methods that train."""
        if not any(run.config.needs_training for run in self.runs):
            return
        if train_set is None or len(dataset_of(train_set)) == 0:
            raise ConfigError(
                "quantize.method: qat trains, and the recipe's training set "
                "is empty; name training data (such as train_splits) or "
                "choose another method"
            )
        self._trainer = BrainTrainer(
            self.brain,
            train_set,
            loader_options,
            self.config.signal,
            self.config.seed,
        )

    # -- the Brain's two verbs ---------------------------------------------

    @distributed.loss_in_one_line()
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """``Brain.fit``; keeps the data sets for later.

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
        self._take_train_set(
            call.get("train_set"), call.get("train_loader_kwargs") or {}
        )
        self._check_metric_early()
        valid_set = call.get("valid_set")
        if valid_set is not None and any(
            run.config.plan is None for run in self.runs
        ):
            self._take_valid_set(
                valid_set, call.get("valid_loader_kwargs") or {}
            )
        self._take_folder()
        try:
            return self._fit(*args, **kwargs)
        except BaseException:
            self._lock.release()
            raise

    def _take_folder(self) -> None:
        """Keeps other runs out of the output folder, to the end of the next
        evaluation. Several processes have one that writes there."""
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
                return self._evaluate_both(
                    test_set, max_key, min_key, progressbar, test_loader_kwargs
                )
            finally:
                self._lock.release()

    def _evaluate_both(
        self,
        test_set: Dataset | DataLoader,
        max_key: str | None,
        min_key: str | None,
        progressbar: bool | None,
        test_loader_kwargs: Mapping[str, Any] | None,
    ) -> Any:
        options = dict(test_loader_kwargs or {})
        _unwrap(self.brain)
        if any(run.config.plan is None for run in self.runs):
            self._require_subsets()
        name = self._set_name()
        if len(test_set) == 0:
            raise ValueError(
                f"quantize: the test set '{name}' is empty; evaluate() needs "
                "at least one utterance"
            )
        self._check_audio(dataset_of(test_set))
        self._check_batches(test_set, options)
        self._check_metric()
        self._take_folder()
        clock, texts = self._clock(), []

        def on_evaluate_start(max_key=None, min_key=None) -> None:
            if self._recover_once(recover, max_key, min_key):
                self._try_out(test_set, options)
            # What was tried is none of the float model's time.
            stack.enter_context(clock.running())
            texts.append(stack.enter_context(self._before.listening()))

        recover = self.brain.on_evaluate_start
        with (
            shadowed(self.brain, "on_evaluate_start", on_evaluate_start),
            ExitStack() as stack,
        ):
            loss = self._evaluate(
                test_set,
                max_key=max_key,
                min_key=min_key,
                progressbar=progressbar,
                # Brain.evaluate changes what it is given.
                test_loader_kwargs=dict(options),
            )
        metric = self._metric()
        heard = self._before.check_baseline(metric, texts[-1], name)
        baseline = Evaluation.of(metric, clock, heard)
        if self._dependencies is None:
            parts = (self._modules[key] for key in self.config.target)
            layers = [layer for part in parts for layer in part.modules()]
            self._dependencies = Dependencies(self.brain, layers)
        kept = vars(self.brain).copy()
        for run in self.runs:
            if run.plan is None:
                self._quantize(run, test_set, options)
            quantized = self._evaluate_quantized(
                run, baseline, test_set, options, name
            )
            run.results[name] = SetResult.pair(baseline, quantized)
            if not distributed.is_main():
                continue
            run.write_report(self._modules, self._environment(), self._outputs)
        # Whoever reads the Brain's metrics now finds those of its own
        # evaluation, as without this stage.
        vars(self.brain).update(kept)
        if len(self.runs) > 1 and distributed.is_main():
            with self._outputs.writing():
                write_comparison(self.runs, self._modules, self.folder)
        self.store.flush()
        self._outputs.check()
        return loss

    def _try_runtimes(self) -> None:
        """Lets each run's runtime prove itself before the search; runs that
        are alike, once."""
        modules, device = self._modules, str(self.brain.device)
        tried: dict[tuple, tuple[str, list[str]]] = {}
        for run in self.runs:
            if run.plan is not None:
                continue
            config = run.config
            layers = find_layers(
                modules, config.target, config.include, config.exclude
            )
            key = (
                *(run.backend, repr(config.backend_options)),
                *(config.weight_bits, config.activation_bits),
                *(layer.name for layer in layers),
            )
            if key in tried:
                run.change_runtime(*tried[key])
                continue
            reasons = run.try_runtime(modules, layers, device)
            tried[key] = (run.backend, reasons)

    def _recover_once(
        self, recover: Callable, max_key: str | None, min_key: str | None
    ) -> bool:
        """Recovers the best checkpoint at the first evaluation only, and says
        whether this is it."""
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

    def _try_out(
        self, test_set: Dataset | DataLoader, options: Mapping[str, Any]
    ) -> None:
        """Tries on one batch what will be executed and written."""
        # The recipe's own evaluation must not see other random numbers.
        with torch.random.fork_rng():
            batch = next(iter(self._loader(test_set, options)))
            self._before.try_batch(batch)
            self._try_runtimes()

    def _check_batches(
        self, test_set: Dataset | DataLoader, options: Mapping[str, Any]
    ) -> None:
        """Rivals see no padding. A loader that samples batches itself says
        no size: its batches are checked when they come."""
        rivals = [run for run in self.runs if run.config.is_rival]
        if not rivals:
            return
        size = self._loader(test_set, options).batch_size
        if size is not None:
            require_one(size)

    def _require_subsets(self) -> None:
        if not self.runs[0].subsets:
            raise ValueError(
                "quantize.calibration: no validation set; the recipe's fit() "
                "got none, so give one to StableQuant.attach(brain, "
                "valid_set=...) or set quantize.plan"
            )
        if self._trainer is None:
            self._take_train_set(None, {})

    def _check_metric(self) -> None:
        if self.runs[0].results:
            return
        self.brain.on_stage_start(sb.Stage.VALID, epoch=None)
        self._metric()

    def _check_metric_early(self) -> None:
        """The same before a training, where a recipe allows it."""
        try:
            self.brain.on_stage_start(sb.Stage.VALID, epoch=None)
        except Exception as error:
            # Some recipes prepare this in their training.
            logger.debug("quantize: metric not checked yet: %s", error)
            return
        self._metric()

    def _metric(self) -> Any:
        return metric_of(self.brain, self.config.metric_attribute)

    @property
    def _show_progress(self) -> bool:
        return distributed.is_main() and not self.brain.noprogressbar

    # -- plan, quantized evaluation, report --------------------------------

    def _session(self, run: Run) -> Session:
        recognizer = BrainRecognizer(
            self.brain,
            run.subsets,
            self.config.metric_attribute,
            self._show_progress,
            self._trainer,
            self._dependencies,
        )
        with self._outputs.writing():
            run.folder.mkdir(parents=True, exist_ok=True)
        # Histograms and evaluations are shared by all variants.
        return Session(recognizer, run.config, self.store, runtimes_with)

    def _quantize(
        self,
        run: Run,
        test_set: Dataset | DataLoader,
        options: Mapping[str, Any],
    ) -> None:
        """Makes what a run evaluates."""
        started = time.monotonic()
        if run.config.is_rival:
            self._make_rival(run, test_set, options)
            seconds = time.monotonic() - started
        else:
            layers = self._make_plan(run)
            seconds = time.monotonic() - started
            self._convert(run, layers)
            if distributed.is_main():
                self._write_model(run)
            found = distributed.from_main((run.source, run.probe))
            run.source, run.probe = found
        if run.config.plan is None:
            training = run.config.needs_training
            run.remember_effort(seconds, self._trainer.ids if training else ())

    def _make_rival(
        self,
        run: Run,
        test_set: Dataset | DataLoader,
        options: Mapping[str, Any],
    ) -> None:
        """Lets others quantize; the plan only says who, and holds no layer."""
        session = self._session(run)
        batch = next(iter(self._loader(test_set, options)))
        # That there is one was found out before.
        calls = find_chain(self.brain, batch, run.config)
        modules = self._modules
        run.rival = make_rival(
            session.recognizer,
            {call.key: modules[call.key] for call in calls},
            calls[0].args[0],
            calls[-1].output,
            session.fingerprint(),
            run.config,
            run.store,
        )
        run.warnings += run.rival.notes()
        run.plan = session.assemble(
            session.fingerprint(), [], [], run.rival.search
        )

    def _make_plan(self, run: Run) -> list[Layer]:
        session = self._session(run)
        run.plan, run.histograms = make_plan(session)
        with self._outputs.writing():
            run.plan.save(run.folder / PLAN_FILE)
        return session.layers

    def _convert(self, run: Run, layers: Iterable[Layer]) -> None:
        """Makes the integers of a plan."""
        quants = run.plan.quants()
        tensors = run.plan.tensors
        decided = {} if tensors is None else tensors.layers
        with run.as_stored(self._modules):
            run.integers = {
                layer.name: stored_layer(
                    integer_layer(
                        layer, quants[layer.name], decided.get(layer.name)
                    ),
                    run.config.float_dtype,
                ).to("cpu")  # there are those of all runs
                for layer in layers
                if layer.name in quants
            }

    def _write_model(self, run: Run) -> None:
        """Writes the integers, with all that loads them."""
        with run.adjusted(self._modules), self._outputs.writing():
            run.probe = write_folder(
                run.folder,
                self._modules,
                run.plan,
                run.integers,
                run.config.float_dtype,
                run.source,
            )
        if run.probe is None:
            with run.as_stored(self._modules):
                run.make_probe(self._modules, str(self.brain.device))

    def _loader(
        self, test_set: Dataset | DataLoader, options: Mapping[str, Any]
    ) -> DataLoader:
        if isinstance(test_set, DataLoader):
            return test_set
        return self.brain.make_dataloader(
            test_set, sb.Stage.TEST, **{**options, "ckpt_prefix": None}
        )

    def _evaluate_quantized(
        self,
        run: Run,
        baseline: Evaluation,
        test_set: Dataset | DataLoader,
        options: Mapping[str, Any],
        name: str,
    ) -> Evaluation:
        """Evaluates a set once more as the plan says, in the TEST stage.

        What an earlier, killed run has finished is read from disk.
        """
        file = f"transcripts_{name}.json"
        # Shows what is read while the set is recognized and scored.
        batch = next(iter(self._loader(test_set, options)))
        decoding = self._dependencies.key(batch, sb.Stage.TEST, "scores")
        key = self._evaluation_key(run, baseline, decoding)
        known = distributed.from_main(Evaluation.read(run.store, file, key))
        if known is not None:
            return known
        loader = self._loader(test_set, options)
        total = len(loader)
        if self.brain.debug:
            total = min(total, self.brain.debug_batches)
        mine = distributed.share(total)
        batches = islice(loader, mine.start, mine.stop, mine.step)
        clock = self._clock()
        modules = self._modules
        device = str(self.brain.device)
        with (
            run.as_stored(modules),
            run.executed(modules, device),
            clock.running(),
            self._before.listening() as texts,
        ):
            if key != self._evaluation_key(run, baseline, decoding):
                # Another runtime than was thought computes it.
                key = self._evaluation_key(run, baseline, decoding)
                known = distributed.from_main(
                    Evaluation.read(run.store, file, key)
                )
                if known is not None:
                    return known
            steps = evaluation_steps(
                self.brain,
                batches,
                sb.Stage.TEST,
                self.config.metric_attribute,
            )
            bar = tqdm(
                steps,
                f"{name}, quantized {run.name}".strip(),
                len(mine),
                dynamic_ncols=True,
                disable=not self._show_progress,
            )
            counts = [count for _, _, count in bar]
        metric = self._metric()
        texts = join_rows(texts, counts)
        join_metric(metric, counts)
        metric.summarize()
        text = io.StringIO()
        metric.write_stats(text)
        with self._outputs.writing():
            write_atomic(run.folder / f"wer_{name}.txt", text.getvalue())
        heard = self._before.compare(metric, texts, [run])
        evaluation = Evaluation.of(metric, clock, heard)
        evaluation.write(run.store, file, key)
        return evaluation

    def _evaluation_key(
        self, run: Run, baseline: Evaluation, decoding: str
    ) -> str:
        """What the words and the times of the report depend on."""
        how = [decoding, run.backend, run.config.float_dtype, *run.warnings]
        how.append(repr(run.config.backend_options))
        how += [self._environment(), code_digest()]
        if run.rival is not None:
            how.append(run.rival.key)
        return baseline.key(run.plan, *how)

    def _environment(self) -> dict[str, str | int]:
        return environment(str(self.brain.device), self.brain.eval_precision)

    def _clock(self) -> ForwardClock:
        config = self.config
        return ForwardClock(self.brain, config.signal, config.sample_rate)

    def _set_name(self) -> str:
        """Name of a test set: of the recipe's WER file, else a number."""
        path = getattr(self.brain.hparams, "test_wer_file", None)
        name = Path(str(path)).stem.removeprefix("wer_") if path else "test"
        unique, number = name, 1
        while unique in self.runs[0].results:
            number += 1
            unique = f"{name}-{number}"
        return unique
