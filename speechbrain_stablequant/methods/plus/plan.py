"""StableQuant-plus: more parts, each with a switch of its own.

In this order: the stream of the transformer is rotated, factors move from
activations to weights (equalization), ranges are cut off layer by layer or as
StableQuant does, scales minimize the squared error, bits are given to units
under a budget, weights are rounded with compensation, biases take up what
mean error is left. The layer that takes in the audio itself may stay float.

StableQuant decides by word errors. With many parts, each of which changes
little, they are too few: here the divergence of the outputs from those of the
float model decides (see :mod:`..search.divergence`). What each part brought is
in the plan's ``search`` block.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from torch import nn
from tqdm import tqdm

from ...core.affine import GELU_MIN
from ...core.calibrators import clipped_mse
from ...core.histogram import Histogram
from ...core.packing import packed_size
from ...core.plan import LayerPlan, LayerQuant, QuantizationPlan, UnitPlan
from ...core.plan_tensors import AdjustedTensors, LayerTensors
from ...model.layers import Layer
from ...model.rotation import rotation_of
from ...simulation.fake_quant import Simulator
from ...simulation.observers import Observer
from ..layerwise import AdaRound, Compensate
from ..search import Evaluate, Score, search_layers
from ..search.bit_allocation import Option, choose_bits, harms
from ..session import (
    Calibration,
    Stage,
    calibrations,
    keep_float_outputs,
    rounded_layers,
    search_evaluate,
)
from ..stablequant import search_units
from .modelopt_scores import modelopt_scores
from .quarot import can_rotate, is_rotated, rotated, rotated_floats
from .smoothquant import (
    ChannelMaxima,
    changed_floats,
    equalized,
    factors,
    find_sites,
)
from .zero_point import ShiftedObserver, behind_gelu, lopsided_range

FLOAT_BITS = 16
# Of a layer in the file: its description, the names of its tensors.
_HEADER_BYTES = 700


def plus_plan(
    stage: Stage, weights: str, calibration: Calibration
) -> tuple[QuantizationPlan, dict[str, Histogram]]:
    """Makes the plan of ``method: stablequant_plus``.

    Arguments
    ---------
    stage : Stage
        The recognizer, its configuration and its layers.
    weights : str
        Fingerprint of the float model.
    calibration : Calibration
        Of the float model as it is.

    Returns
    -------
    QuantizationPlan
        What was decided.
    dict
        The histograms that it was decided on.
    """
    return _Plus(stage, weights, calibration).make()


@dataclass
class _State:
    """The float model as it is being quantized, equalized or not."""

    weights: str
    calibration: Calibration
    shifted: Mapping[str, Histogram] = field(default_factory=dict)

    @property
    def histograms(self) -> dict[str, Histogram]:
        return self.calibration.histograms


class _Plus:
    def __init__(self, stage: Stage, weights: str, calibration):
        self.stage = stage
        self.config = stage.config
        self.plus = stage.config.plus
        self.original = _State(weights, calibration)
        self.rotated = []
        if self.plus.rotate:
            self.rotated = [e for e in stage.encoders if can_rotate(e)]
        self.waves: set[str] = set()
        if self.plus.keep_first_conv_float:
            self.waves = _take_in_audio(stage)
        self.parts: list[dict] = []
        self.evaluations = 0
        self.gelu: set[str] = set()
        if self.plus.asymmetric:
            self.gelu = behind_gelu(stage.encoders, stage.layers)

    def make(self) -> tuple[QuantizationPlan, dict[str, Histogram]]:
        stage = self.stage
        keep_float_outputs(stage)
        with ExitStack() as stack:
            stack.callback(self._fresh_simulator)
            stack.enter_context(rotated(self.rotated, self.config.seed))
            self._fresh_simulator()
            sites = [
                site
                for site in find_sites(stage.encoders, stage.layers)
                if not is_rotated(site.producer, self.rotated)
            ]
            strength = 0.0
            if self.plus.equalize and sites:
                strength, context = self._best_strength(sites)
                stack.enter_context(context)
                self._fresh_simulator()
            state = self._state(strength)
            return self._decide(state, sites if strength else [])

    def _fresh_simulator(self) -> None:
        """Without the fake-quantized weights of another float model."""
        self.stage.simulator = Simulator(self.stage.layers)

    # -- equalization ------------------------------------------------------

    def _best_strength(
        self, sites: list
    ) -> tuple[float, AbstractContextManager[None]]:
        """The strength with the least divergence, and its context."""
        stage = self.stage
        maxima = ChannelMaxima([site.consumers[0] for site in sites])
        with maxima.watch():
            stage.recognizer.forward("calibration", lambda _: None)
        maxima.join()

        def context(strength: float) -> AbstractContextManager[None]:
            if not strength:
                return nullcontext()
            by_site = {
                site.name: factors(
                    site, maxima.values[site.consumers[0].name], strength
                )
                for site in sites
            }
            return equalized(sites, by_site)

        found: list[tuple[float, float]] = []
        for strength in sorted({0.0, *self.plus.strengths}):
            with context(strength):
                self._fresh_simulator()
                state = self._state(strength)
                quants = self._quants(state, {}, {})
                harm = self._measure(
                    state, quants, "equalize", strength=strength
                )
            found.append((harm, strength))
        self._fresh_simulator()
        _, best = min(found)
        return best, context(best)

    def _state(self, strength: float) -> _State:
        """Fingerprint and histograms of the model as it is now."""
        stage, state = self.stage, self.original
        suffix = "_rotated" if self.rotated else ""
        if strength:
            suffix += f"_equalized_{strength:g}"
        weights = stage.fingerprint() if suffix else state.weights
        wanted = {f"histograms{suffix}.json": (stage.layers, Observer)}
        if self.gelu:
            layers = [x for x in stage.layers if x.name in self.gelu]
            file = f"histograms{suffix}_shifted.json"
            wanted[file] = (layers, ShiftedObserver)
        calibration, *shifted = calibrations(stage, weights, wanted)
        return _State(
            weights, calibration, shifted[0].histograms if shifted else {}
        )

    # -- numbers of a layer ------------------------------------------------

    def _quant(
        self,
        layer: Layer,
        state: _State,
        cutoff: float,
        bits: int | None = None,
    ) -> LayerQuant:
        """Scales of the least squared error below a cut-off ratio."""
        weight_bits = bits or self.config.weight_bits
        activation_bits = self.config.activation_bits
        if bits is not None:
            activation_bits = max(bits, activation_bits)
        ratio, offset = cutoff / 100, 0.0
        if layer.name in state.shifted:
            shifted = state.shifted[layer.name]
            upper = shifted.quantile(ratio) + GELU_MIN
            amax, offset = lopsided_range(shifted, activation_bits, upper)
        else:
            histogram = state.histograms[layer.name]
            edge = histogram.quantile(ratio)
            amax = clipped_mse(histogram, edge, activation_bits)
        return LayerQuant(
            weight_bits,
            activation_bits,
            float(amax),
            self.config.weight_method or "mse",
            float(offset),
            self._group(layer, weight_bits),
        )

    def _cut_quant(
        self, state: _State, layer: Layer, cutoff: float
    ) -> LayerQuant:
        """The range itself, as the search of StableQuant tries it."""
        config, ratio, offset = self.config, cutoff / 100, 0.0
        if layer.name in state.shifted:
            shifted = state.shifted[layer.name]
            amax, offset = lopsided_range(
                shifted,
                config.activation_bits,
                shifted.quantile(ratio) + GELU_MIN,
                search=False,
            )
        else:
            amax = state.histograms[layer.name].quantile(ratio)
        return LayerQuant(
            config.weight_bits,
            config.activation_bits,
            float(amax),
            "max",
            float(offset),
            self._group(layer, config.weight_bits),
        )

    def _quants(
        self,
        state: _State,
        cutoffs: Mapping[str, float],
        bits: Mapping[str, int],
    ) -> dict[str, LayerQuant]:
        """All layers that are quantized; by layer or unit: what differs from
        no cut-off and the block's bits."""
        return {
            layer.name: self._quant(
                layer,
                state,
                cutoffs.get(layer.name, 100.0),
                bits.get(layer.unit),
            )
            for layer in self.stage.layers
            if layer.name not in self.waves
            and bits.get(layer.unit) != FLOAT_BITS
        }

    def _group(self, layer: Layer, weight_bits: int) -> int:
        """Groups below 6 bits, of linears that they divide."""
        group = self.plus.weight_groups
        if not group or weight_bits >= 6 or layer.kind != "linear":
            return 0
        return 0 if layer.module.in_features % group else group

    # -- the steps ---------------------------------------------------------

    def _decide(
        self, state: _State, sites: list
    ) -> tuple[QuantizationPlan, dict[str, Histogram]]:
        stage, plus = self.stage, self.plus
        units, cutoffs = self._cutoffs(state)
        bits = self._bits(state, cutoffs)
        quants = self._quants(state, cutoffs, bits)
        self._measure(state, quants, "scales")
        tensors: dict[str, LayerTensors] = {}
        rounds = plus.compensate or plus.adaround
        if sites or self.rotated or rounds or plus.bias_correction:
            tensors = self._round(state, quants, units)
        if rounds and not plus.bias_correction:
            self._measure_tensors(state, quants, "rounding", tensors)
        if plus.bias_correction:
            tensors = self._with_good_biases(state, quants, tensors)
        stage.simulator.tensors = tensors
        baseline, final = self._word_errors(state, quants, tensors)
        floats = changed_floats(sites, quants)
        # Where both changed a parameter, both copies are the present value.
        floats |= rotated_floats(self.rotated, quants)
        adjusted = AdjustedTensors(tensors, floats)
        layers = [
            self._layer_plan(layer, state, cutoffs, quants.get(layer.name))
            for layer in stage.layers
        ]
        search = {
            "num_utterances": len(stage.recognizer.ids("search")),
            "metric": self.config.search.metric,
            "selection": self.config.search.selection,
            "level": self.config.search.level,
            "threshold": self.config.search.threshold,
            "evaluations": self.evaluations,
            "baseline_wer": baseline.wer,
            "final_wer": final.wer,
            "parts": self.parts,
            "runtimes": self._runtimes(quants),
        }
        plan = stage.assemble(self.original.weights, units, layers, search)
        plan = QuantizationPlan(
            **{**vars(plan), "tensors": adjusted if adjusted else None}
        )
        return plan, state.histograms

    def _cutoffs(
        self, state: _State
    ) -> tuple[list[UnitPlan], dict[str, float]]:
        """What was found out about units, and the cut-off of each layer."""
        stage = self.stage
        if self.plus.cutoffs == "units":
            evaluate, journal, bar = search_evaluate(
                stage, state.weights, state.calibration
            )
            _, units = search_units(
                stage, evaluate, bar, partial(self._cut_quant, state)
            )
            self.evaluations += journal.measured + journal.reused
            by_unit = {unit.name: unit.cutoff for unit in units}
            return units, {x.name: by_unit[x.unit] for x in stage.layers}
        units = [UnitPlan(name) for name in stage.units]
        if self.plus.cutoffs == "none":
            return units, {}
        evaluate, journal, bar = search_evaluate(
            stage, state.weights, state.calibration, "divergence"
        )
        by_name = {layer.name: layer for layer in stage.layers}
        names = {
            unit: [x.name for x in layers if x.name not in self.waves]
            for unit, layers in stage.units.items()
        }
        with bar:
            # Most layers need no more than the first ratio and one worse.
            bar.total = 2 * sum(map(len, names.values()))
            found = search_layers(
                names,
                self.config.search.cutoffs,
                lambda name, ratio: self._quant(by_name[name], state, ratio),
                evaluate,
            )
        self.evaluations += journal.measured + journal.reused
        self.parts.append(
            {
                "part": "cutoffs",
                "layers": {
                    x.layer: [list(row) for row in x.curve] for x in found
                },
            }
        )
        return units, {x.layer: x.cutoff for x in found}

    def _bits(
        self, state: _State, cutoffs: Mapping[str, float]
    ) -> dict[str, int]:
        """Bits by unit under the budget; empty without one."""
        budget = self.plus.budget
        if budget.size is None:
            return {}
        if budget.scores == "modelopt":
            options = self._modelopt_options(state)
        else:
            options = self._measured_options(state, cutoffs)
        room = self._room(budget.size)
        chosen = choose_bits(options, room)
        found = harms(options)
        self.parts.append(
            {
                "part": "budget",
                "scores": budget.scores,
                "size": budget.size,
                "bytes": room,
                "units": {
                    unit: {
                        "bits": chosen[unit],
                        "options": [
                            {**asdict(option), "counted": harm}
                            for option, harm in zip(
                                options[unit], found[unit], strict=True
                            )
                        ],
                    }
                    for unit in options
                },
            }
        )
        return chosen

    def _measured_options(
        self, state: _State, cutoffs: Mapping[str, float]
    ) -> dict[str, list[Option]]:
        """By the divergence that each unit alone causes at each width."""
        stage = self.stage
        evaluate, journal, bar = search_evaluate(
            stage, state.weights, state.calibration, "divergence"
        )
        widths = sorted(set(self.plus.budget.bits))
        options = {}
        with bar:
            bar.total = len(stage.units) * len(widths)
            for unit, layers in stage.units.items():
                options[unit] = [
                    self._option(state, unit, layers, cutoffs, b, evaluate)
                    for b in widths
                ]
        self.evaluations += journal.measured + journal.reused
        return options

    def _modelopt_options(self, state: _State) -> dict[str, list[Option]]:
        """By the scores of modelopt's AutoQuantize, of the calibration set."""
        stage = self.stage
        widths = sorted(set(self.plus.budget.bits))
        layers = [x for x in stage.layers if x.name not in self.waves]
        integer = [bits for bits in widths if bits != FLOAT_BITS]
        scores = {}
        if integer:
            scores = modelopt_scores(stage, state.weights, layers, integer)
        return {
            unit: [
                Option(
                    bits,
                    self._size(members, bits),
                    sum(scores.get(x.name, {}).get(bits, 0.0) for x in members),
                )
                for bits in widths
            ]
            for unit, members in stage.units.items()
        }

    def _option(
        self,
        state: _State,
        unit: str,
        layers: list[Layer],
        cutoffs: Mapping[str, float],
        bits: int,
        evaluate: Evaluate,
    ) -> Option:
        size = self._size(layers, bits)
        layers = [x for x in layers if x.name not in self.waves]
        if bits == FLOAT_BITS or not layers:
            return Option(bits, size, 0.0)
        quants = {
            x.name: self._quant(x, state, cutoffs.get(x.name, 100.0), bits)
            for x in layers
        }
        score = evaluate(quants, start=unit, label=f"{unit} at {bits} bits")
        return Option(bits, size, score.loss)

    def _size(self, layers: list[Layer], bits: int) -> int:
        """Bytes of layers on disk, biases not counted."""
        size = 0
        for layer in layers:
            if bits == FLOAT_BITS or layer.name in self.waves:
                size += layer.numel * self._float_bytes()
                continue
            group = self._group(layer, bits)
            scales = layer.module.weight.shape[0]
            if group:
                scales *= layer.module.in_features // group
            size += packed_size(layer.numel, bits) + 4 * scales
            size += _HEADER_BYTES
        return size

    def _float_bytes(self) -> int:
        return 2 if self.config.float_dtype == "float16" else 4

    def _room(self, fraction: float) -> int:
        """Bytes that a budget leaves to the weights of the layers."""
        modules = self.stage.recognizer.modules
        counts: dict[int, int] = {}
        for key in self.config.target:
            for parameter in modules[key].parameters():
                counts[id(parameter)] = parameter.numel()
        every = sum(counts.values())
        rest = every - sum(layer.numel for layer in self.stage.layers)
        # Not in the float model, and yet in the file.
        rest += sum(
            rotation_of(encoder.model.encoder).numel()
            for encoder in self.rotated
        )
        return int(4 * every * fraction) - rest * self._float_bytes()

    def _round(
        self,
        state: _State,
        quants: Mapping[str, LayerQuant],
        units: list[UnitPlan],
    ) -> dict[str, LayerTensors]:
        """Integers and biases, each layer behind the ones before it."""
        plus = self.plus
        selected = {unit.name for unit in units if unit.selected}
        settings = asdict(self.config.adaround)
        settings.pop("calibrator")
        learned = AdaRound(**settings)
        compensated = Compensate(plus.damping, plus.earlier_errors)
        without = self._biases_without_effect()

        def solve(layer: Layer):
            if plus.adaround and layer.unit in selected:
                return learned
            return compensated if plus.compensate else None

        return rounded_layers(
            self.stage,
            state.weights,
            state.calibration.in_order,
            quants,
            "plus",
            solve,
            lambda layer: plus.bias_correction and layer.name not in without,
        )

    def _with_good_biases(
        self,
        state: _State,
        quants: Mapping[str, LayerQuant],
        tensors: Mapping[str, LayerTensors],
    ) -> dict[str, LayerTensors]:
        """With the corrected biases, unless the model is better without."""
        without = {name: replace(t, bias=None) for name, t in tensors.items()}
        plain = self._measure_tensors(state, quants, "rounding", without)
        harm = self._measure_tensors(
            state, quants, "rounding and biases", tensors
        )
        return dict(tensors) if harm < plain else without

    def _measure_tensors(
        self,
        state: _State,
        quants: Mapping[str, LayerQuant],
        part: str,
        tensors: Mapping[str, LayerTensors],
    ) -> float:
        self.stage.simulator.tensors = dict(tensors)
        return self._measure(state, quants, part, tensors)

    def _biases_without_effect(self) -> set[str]:
        """Convolutions whose output is normalized over time by channel."""
        modules = {
            id(stage.conv)
            for encoder in self.stage.encoders
            for stage in encoder.model.feature_extractor.conv_layers
            if isinstance(getattr(stage, "layer_norm", None), nn.GroupNorm)
        }
        layers = self.stage.layers
        return {x.name for x in layers if id(x.module) in modules}

    # -- what is written down ----------------------------------------------

    def _measure(
        self,
        state: _State,
        quants: Mapping[str, LayerQuant],
        part: str,
        tensors: Mapping[str, LayerTensors] | None = None,
        **values: float,
    ) -> float:
        """Divergence of the whole model; writes down what a part brought."""
        words = " ".join([part, *(f"{value:g}" for value in values.values())])
        evaluate, bar = self._evaluate(state, tensors, "divergence")
        with bar:
            found = evaluate(quants, label=words).loss
        self.parts.append({"part": part, **values, "divergence": found})
        return found

    def _word_errors(
        self,
        state: _State,
        quants: Mapping[str, LayerQuant],
        tensors: Mapping[str, LayerTensors],
    ) -> tuple[Score, Score]:
        """Of the float model, and of what was decided."""
        # The float model is the same, rotated and equalized or not.
        evaluate, bar = self._evaluate(self.original, None)
        with bar:
            baseline = evaluate({}, label="float")
        evaluate, bar = self._evaluate(state, tensors)
        with bar:
            return baseline, evaluate(quants, label="final")

    def _evaluate(
        self,
        state: _State,
        tensors: Mapping[str, LayerTensors] | None,
        metric: str | None = None,
    ) -> tuple[Evaluate, tqdm]:
        """Of the model with some tensors, which its simulator holds."""
        weights = state.weights
        if tensors:
            weights += AdjustedTensors(dict(tensors)).digest()
        evaluate, _, bar = search_evaluate(
            self.stage, weights, state.calibration, metric
        )

        def counted(*args, **options) -> Score:
            self.evaluations += 1
            return evaluate(*args, **options)

        return counted, bar

    def _layer_plan(
        self,
        layer: Layer,
        state: _State,
        cutoffs: Mapping[str, float],
        quant: LayerQuant | None,
    ) -> LayerPlan:
        cutoff = cutoffs.get(layer.name, 100.0)
        if layer.name in self.waves:
            reason = "stays float: it takes in the audio itself"
        elif quant is None:
            reason = "stays float: its unit suffers more than its size is worth"
        else:
            words = [f"cut at {cutoff:g} %, then smallest squared error"]
            if quant.activation_offset:
                words.append("offset for an input behind a GELU")
            if quant.weight_group:
                words.append(f"a weight scale for {quant.weight_group} inputs")
            elif self.plus.weight_groups and quant.weight_bits < 6:
                words.append("weight scales of whole rows")
            reason = "; ".join(words)
        return LayerPlan(
            name=layer.name,
            unit=layer.unit,
            kind=layer.kind,
            quant=quant,
            observed_max=state.histograms[layer.name].max,
            cutoff=cutoff,
            reason=reason,
        )

    def _runtimes(self, quants: Mapping[str, LayerQuant]) -> list[str]:
        needs = (quant.extras for quant in quants.values())
        return self.stage.runtimes_with(frozenset().union(*needs))


def _take_in_audio(stage: Stage) -> set[str]:
    """The first convolution of each encoder."""
    first = {
        id(encoder.model.feature_extractor.conv_layers[0].conv)
        for encoder in stage.encoders
    }
    return {layer.name for layer in stage.layers if id(layer.module) in first}
