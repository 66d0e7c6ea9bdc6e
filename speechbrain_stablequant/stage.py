"""The steps of quantization, driven over a recogniser.

What a recogniser is (a Brain with its data) is said by a protocol; this module
knows no toolkit.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

from . import calibrators
from .adjusted import AdjustedTensors, LayerTensors
from .baselines import AdaRound, LayerStore, PrefixWalk, refine
from .baselines.auto_quantize import (
    auto_quantize_scores,
    inputs_of_first,
    modelopt_version,
)
from .baselines.qat import Trainer
from .baselines.refine import Solve
from .calibrators import clipped_mse
from .config import QuantizeConfig
from .files import read_json, write_json
from .histogram import Histogram
from .layers import Cut, Layer, find_encoders, find_layers, group_units
from .observers import Observer
from .plan import LayerPlan, LayerQuant, QuantizationPlan, UnitPlan
from .plus import make_plus_plan
from .qat import make_qat_plan
from .replay import Replay
from .search import (
    Divergence,
    Evaluate,
    Journal,
    Score,
    Selection,
    search_cutoffs,
    select_units,
)
from .simulate import Simulator

logger = logging.getLogger(__name__)

BeforeBatch = Callable[[int], None]

JOURNAL_FILE = "search.jsonl"
HISTOGRAM_FILE = "histograms.json"
LAYER_FOLDER = "finished_layers"
SCORE_FILE = "auto_quantize.json"


class Recogniser(Protocol):
    """What a stage needs of a speech recogniser and its data.

    ``subset`` is ``"calibration"`` or ``"search"``.
    """

    modules: Mapping[str, nn.Module]
    show_progress: bool
    #: The training loop; None where nothing is trained.
    trainer: Trainer | None

    def ids(self, subset: str) -> list[str]:
        """Utterances of a subset, in the order in which they are run."""

    def lengths(self, subset: str, batch: int) -> tuple[int, list[int]]:
        """Samples of a padded batch, and real samples of each utterance."""

    def forward(
        self,
        subset: str,
        before_batch: BeforeBatch,
        first_only: bool = False,
        turns: int = 1,
    ) -> torch.Tensor:
        """Runs the model over a subset, each batch so many times in a row;
        returns the last output."""

    def score(
        self,
        before_batch: BeforeBatch,
        give_up_above: int | None,
        only: Sequence[int] | None = None,
    ) -> Score:
        """Measures the recogniser on the search subset, or on some of its
        batches."""

    def outputs(
        self, subset: str, before_batch: BeforeBatch
    ) -> Iterator[torch.Tensor | None]:
        """Runs the model over a subset, and gives the output of each batch."""


@dataclass(frozen=True)
class Calibration:
    """What one pass over the calibration set gave.

    Arguments
    ---------
    histograms : dict
        Histogram of |input| by layer name.
    in_order : bool
        Whether layers were first called in the order of their units.
    """

    histograms: dict[str, Histogram]
    in_order: bool


def check_earlier_run(folder: Path) -> None:
    """Raises if what an earlier run left in a folder cannot be read.

    Arguments
    ---------
    folder : Path
        The output folder.

    Raises
    ------
    ValueError
        Names the damaged file.
    """
    path = folder / HISTOGRAM_FILE
    if path.exists():
        read_json(path, "calibration histograms")
    Journal(folder / JOURNAL_FILE, "")


def fingerprint_modules(modules: Mapping[str, nn.Module]) -> str:
    """Identifies the weights of a model.

    Arguments
    ---------
    modules : Mapping
        Modules by key.

    Returns
    -------
    str
        32 hexadecimal digits of a SHA-256 over names and values.

    Example
    -------
    >>> a = fingerprint_modules({"m": nn.Linear(2, 2)})
    >>> a == fingerprint_modules({"m": nn.Linear(2, 2)})
    False
    """
    digest = hashlib.sha256()
    for key, module in modules.items():
        for name, tensor in module.state_dict().items():
            if not isinstance(tensor, torch.Tensor):
                continue
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{key}.{name}:{tuple(tensor.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Stage:
    """Makes the quantization plan of one recogniser.

    Arguments
    ---------
    recogniser : Recogniser
        The float model with its calibration and search sets.
    config : QuantizeConfig
        The validated block.
    folder : Path
        Where the journal and the histograms are written.
    """

    def __init__(
        self, recogniser: Recogniser, config: QuantizeConfig, folder: Path
    ):
        self.recogniser = recogniser
        self.config = config
        self.folder = Path(folder)
        self.layers = find_layers(
            recogniser.modules, config.target, config.include, config.exclude
        )
        self.units = group_units(self.layers)
        self.encoders = find_encoders(
            {key: recogniser.modules[key] for key in config.target}
        )
        self.simulator = Simulator(self.layers)
        self._exact_cuts: list[Cut] | None = None
        self._divergence: Divergence | None = None

    def fingerprint(self) -> str:
        """Identifies the weights of the model as they are now."""
        return fingerprint_modules(self.recogniser.modules)

    # -- the plan ----------------------------------------------------------

    def make_plan(self) -> tuple[QuantizationPlan, dict[str, Histogram]]:
        """Calibrates and searches, or reads the plan that the block names.

        Returns
        -------
        QuantizationPlan
            What was decided.
        dict
            The histograms of the layers' inputs; empty for a given plan.

        Raises
        ------
        ValueError
            A plan of another model, a layer that is never called, NaN.
        """
        weights = fingerprint_modules(self.recogniser.modules)
        if self.config.plan is not None:
            return self._given_plan(weights), {}
        calibration = self.calibrate(weights)
        histograms = calibration.histograms
        if self.config.method == "stablequant_plus":
            return make_plus_plan(self, weights, calibration)
        if self.config.method == "stablequant":
            plan = self._search(weights, calibration)
        elif self.config.method == "adaround":
            plan = self._adaround(weights, calibration)
        elif self.config.method == "qat":
            start = self._calibrator_plan(
                weights, histograms, self.config.qat.calibrator
            )
            plan = make_qat_plan(self, start)
        else:
            plan = self._calibrator_plan(
                weights, histograms, self.config.method
            )
        return plan, histograms

    def _given_plan(self, weights: str) -> QuantizationPlan:
        plan = QuantizationPlan.load(self.config.plan)
        kinds = {layer.name: layer.kind for layer in self.layers}
        plan.check_matches(kinds, self.config.plan)
        plan.check_tensors(
            self.layers, self.recogniser.modules, self.config.plan
        )
        if plan.fingerprint != weights:
            logger.warning(
                "quantize.plan: %s was made for other weights of the same "
                "architecture; its scales may not fit",
                self.config.plan,
            )
        return plan

    def _settings(self) -> dict:
        settings = asdict(self.config)
        for key in ("output_folder", "plan", "variants"):
            settings.pop(key)
        # Memory for reuse changes the time, not the outcome.
        settings["search"].pop("cache_gb")
        # What the method does not read decided nothing.
        if self.config.method != "stablequant_plus":
            settings.pop("plus")
        if self.config.method not in ("adaround", "stablequant_plus"):
            settings.pop("adaround")
        if not self.config.is_rival:
            settings.pop("nncf")
        if self.config.method != "qat":
            settings.pop("qat")
        return json.loads(json.dumps(settings))

    def assemble(
        self,
        weights: str,
        units: list[UnitPlan],
        layers: list[LayerPlan],
        search: dict,
    ) -> QuantizationPlan:
        """A plan with the settings of this stage."""
        return QuantizationPlan(
            method=self.config.method,
            weight_bits=self.config.weight_bits,
            activation_bits=self.config.activation_bits,
            fingerprint=weights,
            settings=self._settings(),
            search=search,
            units=units,
            layers=layers,
        )

    # -- calibration -------------------------------------------------------

    def calibrate(
        self, weights: str, file: str = HISTOGRAM_FILE
    ) -> Calibration:
        """One pass over the calibration set, remembered on disk.

        Arguments
        ---------
        weights : str
            Fingerprint of the float model.
        file : str
            Name of the file that remembers.

        Returns
        -------
        Calibration
        """
        (found,) = self.calibrations(weights, {file: (self.layers, Observer)})
        return found

    def calibrations(
        self,
        weights: str,
        wanted: Mapping[str, tuple[Sequence[Layer], type[Observer]]],
    ) -> list[Calibration]:
        """Several kinds of histograms from one pass, remembered on disk.

        Arguments
        ---------
        weights : str
            Fingerprint of the float model.
        wanted : Mapping
            For each file that remembers: the layers to observe, and what
            observes them.

        Returns
        -------
        list of Calibration
            In the order of the files.
        """
        ids = self.recogniser.ids("calibration")
        part = self.config.calibration
        keys = {
            file: _digest(
                [
                    weights,
                    ids,
                    part.batch_size,
                    part.num_bins,
                    [layer.name for layer in layers],
                ]
            )
            for file, (layers, _) in wanted.items()
        }
        known = {
            file: self._read_calibration(self.folder / file, key)
            for file, key in keys.items()
        }
        missing = {
            file: observe(layers, self._geometry(), part.num_bins)
            for file, (layers, observe) in wanted.items()
            if known[file] is None
        }
        if missing:
            self._observe(list(missing.values()))
        for file, observer in missing.items():
            known[file] = self._calibration(wanted[file][0], observer)
            self._write_calibration(file, keys[file], known[file])
        return [known[file] for file in wanted]

    def _observe(self, observers: Sequence[Observer]) -> None:
        part = self.config.calibration
        ids = self.recogniser.ids("calibration")
        bar = self._bar(-(-len(ids) // part.batch_size), "calibration")

        def before_batch(index: int) -> None:
            lengths = self.recogniser.lengths("calibration", index)
            for observer in observers:
                observer.start_batch(*lengths)
            bar.update(1)

        with bar, ExitStack() as stack:
            for observer in observers:
                stack.enter_context(observer.watch())
            self.recogniser.forward("calibration", before_batch)

    def _calibration(
        self, layers: Sequence[Layer], observer: Observer
    ) -> Calibration:
        observer.check_all_called()
        called = [self._unit_index(name) for name in observer.call_order]
        return Calibration(
            {layer.name: observer.histograms[layer.name] for layer in layers},
            called == sorted(called),
        )

    def _write_calibration(
        self, file: str, key: str, calibration: Calibration
    ) -> None:
        write_json(
            self.folder / file,
            {
                "key": key,
                "in_order": calibration.in_order,
                "layers": {
                    name: histogram.to_dict()
                    for name, histogram in calibration.histograms.items()
                },
            },
        )

    @staticmethod
    def _read_calibration(path: Path, key: str) -> Calibration | None:
        if not path.exists():
            return None
        raw = read_json(path, "calibration histograms")
        if not isinstance(raw, dict) or raw.get("key") != key:
            return None
        return Calibration(
            {
                name: Histogram.from_dict(state)
                for name, state in raw["layers"].items()
            },
            raw["in_order"],
        )

    def _geometry(self) -> list[tuple[int, int]]:
        if len(self.encoders) != 1:
            return []
        return self.encoders[0].conv_geometry()

    def _unit_index(self, name: str) -> int:
        unit = self.simulator.layers[name].unit
        return list(self.units).index(unit)

    def _bar(self, total: int, what: str) -> tqdm:
        return tqdm(
            total=total,
            desc=what,
            dynamic_ncols=True,
            disable=not self.recogniser.show_progress,
        )

    # -- one calibrator for all layers -------------------------------------

    def _calibrator_plan(
        self,
        weights: str,
        histograms: Mapping[str, Histogram],
        method: str,
    ) -> QuantizationPlan:
        config = self.config
        options = {}
        if method == "percentile":
            options["percentile"] = config.calibration.percentile
        weight_method = config.weight_method or (
            "mse" if method == "mse" else "max"
        )
        layers = []
        for layer in tqdm(
            self.layers, "calibrators", disable=not self._progress
        ):
            histogram = histograms[layer.name]
            amax = calibrators.calibrate(
                method, histogram, config.activation_bits, **options
            )
            layers.append(
                LayerPlan(
                    name=layer.name,
                    unit=layer.unit,
                    kind=layer.kind,
                    quant=self._quant(amax, weight_method),
                    observed_max=histogram.max,
                    cutoff=options.get("percentile", 100.0),
                    reason=f"{method} calibration of every layer",
                )
            )
        units = [UnitPlan(name) for name in self.units]
        return self.assemble(weights, units, layers, {})

    # -- adaptive rounding -------------------------------------------------

    def _adaround(
        self, weights: str, calibration: Calibration
    ) -> QuantizationPlan:
        """AdaRound on the scales that a calibrator gives."""
        settings = asdict(self.config.adaround)
        calibrator = settings.pop("calibrator")
        plan = self._calibrator_plan(
            weights, calibration.histograms, calibrator
        )
        solve = AdaRound(**settings)
        tensors = self.refine(
            weights,
            calibration.in_order,
            plan.quants(),
            "adaround",
            lambda _: solve,
        )
        layers = [
            replace(
                layer,
                reason=f"{calibrator} calibration, then adaptive rounding",
            )
            for layer in plan.layers
        ]
        return replace(
            plan, layers=layers, tensors=AdjustedTensors(layers=tensors)
        )

    def refine(
        self,
        weights: str,
        in_order: bool,
        quants: Mapping[str, LayerQuant],
        what: str,
        solve: Callable[[Layer], Solve | None],
        corrects_bias: Callable[[Layer], bool] = lambda _: False,
    ) -> dict[str, LayerTensors]:
        """Decides integers and biases layer by layer, remembered on disk.

        Arguments
        ---------
        weights : str
            Fingerprint of the float model.
        in_order : bool
            Whether layers are called in the order of their units.
        quants : Mapping
            LayerQuant by name; layers that are not named stay float.
        what : str
            Name of the method, for the progress bar.
        solve : callable
            Of a layer: what finds its integers; None for the nearest ones.
        corrects_bias : callable
            Of a layer: whether its bias is corrected.

        Returns
        -------
        dict
            LayerTensors by name.
        """
        recogniser = self.recogniser
        names = set(quants)
        content = [
            "means of what is in the range",
            weights,
            recogniser.ids("calibration"),
            self.config.calibration.batch_size,
            {name: quant.to_dict() for name, quant in quants.items()},
            [
                [layer.name, repr(solve(layer)), corrects_bias(layer)]
                for layer in self.layers
                if layer.name in names
            ],
        ]
        store = LayerStore(self.folder / LAYER_FOLDER, _digest(content))
        limit = int(self.config.search.cache_gb * 1e9)
        simulator = Simulator(self.layers)
        walk = PrefixWalk(
            simulator,
            list(self.units),
            partial(recogniser.forward, "calibration"),
            lambda batch: recogniser.lengths("calibration", batch),
            self._geometry(),
            self._cuts(in_order and limit > 0),
            limit,
        )
        with self._bar(len(names), what) as bar:

            def on_layer(name: str) -> None:
                bar.update(1)
                bar.set_postfix_str(name.rpartition(".")[2])

            found = refine(walk, quants, store, solve, corrects_bias, on_layer)
        missing = sorted(names - set(found))
        if missing:
            raise ValueError(
                f"{missing[0]}: was not called in the first batch; add it to "
                "quantize.exclude"
            )
        if store.reused:
            logger.info("%s: %d layers from disk", what, store.reused)
        return found

    def auto_quantize_scores(
        self, weights: str, layers: Sequence[Layer], widths: Sequence[int]
    ) -> dict[str, dict[int, float]]:
        """Scores of modelopt's AutoQuantize, remembered on disk.

        Arguments
        ---------
        weights : str
            Fingerprint of the float model.
        layers : sequence of Layer
            What is quantized.
        widths : sequence of int
            Bits of weights.

        Returns
        -------
        dict
            As of :func:`~.baselines.auto_quantize.auto_quantize_scores`.
        """
        recogniser, config = self.recogniser, self.config
        names = [layer.name for layer in layers]
        key = _digest(
            [
                weights,
                recogniser.ids("calibration"),
                config.calibration.batch_size,
                names,
                list(widths),
                config.activation_bits,
                config.seed,
                modelopt_version(),
            ]
        )
        path = self.folder / SCORE_FILE
        known = read_json(path, "modelopt's scores") if path.exists() else {}
        if not isinstance(known, dict) or known.get("key") != key:
            modules = {name: recogniser.modules[name] for name in config.target}
            order, batches = inputs_of_first(
                modules,
                lambda: recogniser.forward("calibration", lambda _: None),
            )
            scores = auto_quantize_scores(
                {name: modules[name] for name in order},
                batches,
                recogniser.forward("calibration", lambda _: None, True),
                layers,
                widths,
                config.activation_bits,
                config.seed,
            )
            known = {
                "key": key,
                "scores": {
                    name: [row[bits] for bits in widths]
                    for name, row in scores.items()
                },
            }
            write_json(path, known)
        return {
            name: dict(zip(widths, row, strict=True))
            for name, row in known["scores"].items()
        }

    def _cuts(self, wanted: bool) -> list[Cut]:
        """Places where a forward pass can be started again."""
        if len(self.encoders) != 1 or not wanted:
            return []
        cuts = self.encoders[0].cuts()
        return [cut for cut in cuts if cut.unit in self.units]

    @property
    def _progress(self) -> bool:
        return self.recogniser.show_progress

    def _quant(self, amax: float, weight_method: str) -> LayerQuant:
        return LayerQuant(
            self.config.weight_bits,
            self.config.activation_bits,
            float(amax),
            weight_method,
        )

    # -- StableQuant -------------------------------------------------------

    def _search(
        self, weights: str, calibration: Calibration
    ) -> QuantizationPlan:
        """The four steps of StableQuant (ICASSP 2025)."""
        config = self.config
        histograms = calibration.histograms
        evaluate, journal, bar = self.search_evaluate(weights, calibration)
        started = time.monotonic()
        baseline, units = self.search_units(
            evaluate,
            bar,
            lambda layer, ratio: self._quant(
                histograms[layer.name].quantile(ratio / 100), "max"
            ),
        )
        layers = self._final_layers(units, histograms)
        final = evaluate(
            {layer.name: layer.quant for layer in layers}, label="final"
        )
        logger.info(
            "search: %d evaluations, %d of them from %s, %.0f s",
            journal.measured + journal.reused,
            journal.reused,
            journal.path,
            time.monotonic() - started,
        )
        search = {
            "num_utterances": len(self.recogniser.ids("search")),
            "metric": config.search.metric,
            "selection": config.search.selection,
            "level": config.search.level,
            "threshold": config.search.threshold,
            "evaluations": journal.measured + journal.reused,
            "baseline_wer": baseline.wer,
            "final_wer": final.wer,
        }
        return self.assemble(weights, units, layers, search)

    def search_units(
        self,
        evaluate: Evaluate,
        bar: tqdm,
        quantize: Callable[[Layer, float], LayerQuant],
    ) -> tuple[Score, list[UnitPlan]]:
        """Steps 1 and 2 of StableQuant: selection and cut-offs.

        Arguments
        ---------
        evaluate : Evaluate
            Measures on the search set.
        bar : tqdm
            Shows how far it is; closed at the end.
        quantize : callable
            Of a layer and a cut-off ratio in percent.

        Returns
        -------
        Score
            Of the float model.
        list of UnitPlan
            What was found out about each unit.
        """
        search = self.config.search
        selection = Selection(search.selection, search.level)

        def cut_unit(unit: str, ratio: float) -> dict[str, LayerQuant]:
            return {
                layer.name: quantize(layer, ratio) for layer in self.units[unit]
            }

        with bar:
            bar.total = 1 + len(self.units)
            baseline, sensitivities = select_units(
                {unit: cut_unit(unit, 100.0) for unit in self.units},
                evaluate,
                search.threshold,
                selection,
            )
            selected = [s.unit for s in sensitivities if s.selected]
            bar.total += len(selected) * len(search.cutoffs)
            bar.refresh()
            cuts = search_cutoffs(
                selected, search.cutoffs, cut_unit, evaluate, selection
            )
        cutoffs = {cut.unit: cut for cut in cuts}
        return baseline, [
            self._unit_plan(sensitivity, cutoffs.get(sensitivity.unit))
            for sensitivity in sensitivities
        ]

    @staticmethod
    def _unit_plan(sensitivity, cut) -> UnitPlan:
        curve = [] if cut is None else cut.curve
        interval = sensitivity.interval
        return UnitPlan(
            name=sensitivity.unit,
            wer=sensitivity.score.wer,
            delta_wer=sensitivity.delta_wer,
            delta_wer_ci=None if interval is None else [*interval[1:]],
            selected=sensitivity.selected,
            cutoff=100.0 if cut is None else cut.cutoff,
            curve=[
                {
                    "cutoff": ratio,
                    "wer": score.wer,
                    "secondary": score.to_dict()["loss"],
                    "complete": score.complete,
                }
                for ratio, score in curve
            ],
        )

    def _final_layers(
        self, units: Iterable[UnitPlan], histograms: Mapping[str, Histogram]
    ) -> list[LayerPlan]:
        """Step 3: MSE scales on the histograms clipped at their cut-offs."""
        bits = self.config.activation_bits
        weight_method = self.config.weight_method or "mse"
        by_name = {unit.name: unit for unit in units}
        layers = []
        for layer in self.layers:
            unit = by_name[layer.unit]
            histogram = histograms[layer.name]
            edge = histogram.quantile(unit.cutoff / 100)
            amax = clipped_mse(histogram, edge, bits)
            if unit.selected:
                reason = (
                    f"unit selected (WER +{unit.delta_wer:.2f} alone), cut "
                    f"at {unit.cutoff:g} %, then smallest squared error"
                )
            else:
                reason = (
                    f"unit not selected (WER {unit.delta_wer:+.2f} alone), "
                    "smallest squared error"
                )
            layers.append(
                LayerPlan(
                    name=layer.name,
                    unit=layer.unit,
                    kind=layer.kind,
                    quant=self._quant(amax, weight_method),
                    observed_max=histogram.max,
                    cutoff=unit.cutoff,
                    reason=reason,
                )
            )
        return layers

    def search_evaluate(
        self,
        weights: str,
        calibration: Calibration,
        metric: str | None = None,
    ) -> tuple[Evaluate, Journal, tqdm]:
        """The evaluate function of the search, remembered in the journal.

        Arguments
        ---------
        weights : str
            Identifies the model, with the tensors that its simulator holds.
        calibration : Calibration
            Says whether layers are called in the order of their units.
        metric : str, optional
            ``"divergence"``: from the float model's outputs, as a score's
            loss; else the block's metric.

        Returns
        -------
        Evaluate
            Measures on the search set.
        Journal
            What remembers.
        tqdm
            Counts the evaluations.
        """
        ids = self.recogniser.ids("search")
        search = self.config.search
        journal = Journal(
            self.folder / JOURNAL_FILE,
            _digest([weights, ids, search.batch_size, metric or search.metric]),
            metric is None and search.selection == "interval",
        )
        replay = self._replay(calibration.in_order)
        bar = self._bar(1, "search")

        def measure(
            quants: Mapping[str, LayerQuant],
            start: str | None = None,
            give_up_above: int | None = None,
            label: str = "",
        ) -> Score:
            bar.set_postfix_str(label)
            score = self.recogniser.score
            if metric == "divergence":
                score = self._float_outputs().score
            with self.simulator.apply(quants):
                if start is None or not replay.prepare(
                    start,
                    self._prefix(quants, start),
                    lambda before: self.recogniser.forward("search", before),
                ):
                    return score(lambda _: None, give_up_above)
                with replay.active():
                    return score(replay.start_batch, give_up_above)

        remembered = journal.wrap(measure)
        float_words: list[int] = []

        def counted(quants: Mapping[str, LayerQuant], **options) -> Score:
            score = remembered(quants, **options)
            bar.update(1)
            if not quants:
                float_words.append(score.words)
            elif not score.complete:
                # Over all words of the set: a lower bound of the WER.
                score = replace(score, words=float_words[0])
            return score

        return counted, journal, bar

    def _float_outputs(self) -> Divergence:
        """Of the float model, on the search set; no layer is quantized."""
        if self._divergence is None:
            self._divergence = Divergence(
                partial(self.recogniser.outputs, "search")
            )
        return self._divergence

    def _prefix(
        self, quants: Mapping[str, LayerQuant], start: str
    ) -> dict[str, tuple[str, LayerQuant]]:
        order = list(self.units)
        before = set(order[: order.index(start)])
        return {
            name: (self.simulator.layers[name].unit, quant)
            for name, quant in quants.items()
            if self.simulator.layers[name].unit in before
        }

    def _replay(self, in_order: bool) -> Replay:
        limit = int(self.config.search.cache_gb * 1e9)
        cuts = self._cuts(in_order and limit > 0)
        if self._exact_cuts is None:
            replay = Replay(cuts, list(self.units), limit)
            replay = verified(replay, self.recogniser)
            self._exact_cuts = list(replay.cuts.values())
        return Replay(self._exact_cuts, list(self.units), limit)


def verified(replay: Replay, recogniser: Recogniser) -> Replay:
    """Drops the cuts from which a replay is not exact.

    Each cut is tried on the first batch; a model that uses more than the
    cut's output (all hidden states, for instance) gives another result.

    Arguments
    ---------
    replay : Replay
        The cuts to try.
    recogniser : Recogniser
        The model and its data.

    Returns
    -------
    Replay
        With the cuts that are exact.
    """

    def first(before: BeforeBatch) -> torch.Tensor:
        return recogniser.forward("search", before, first_only=True)

    if not replay.cuts:
        return replay
    expected = first(lambda _: None)
    good = []
    for unit, cut in replay.cuts.items():
        trial = Replay([cut], replay.units, replay.limit_bytes)
        if trial.prepare(unit, {}, first):
            with trial.active():
                same = torch.equal(first(trial.start_batch), expected)
            if not same:
                logger.warning(
                    "search: results before %s cannot be reused exactly; "
                    "they are computed each time",
                    unit,
                )
                continue
        good.append(cut)
    return Replay(good, replay.units, replay.limit_bytes)
