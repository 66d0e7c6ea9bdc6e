"""StableQuant-plus: more parts, each with a switch of its own.

In this order: factors move from activations to weights (equalisation), units
are selected and cut off as in StableQuant, scales minimise the squared error,
bits are given to units under a budget, weights are rounded with compensation,
biases take up what mean error is left. What each part brought is in the
plan's ``search`` block.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from .adjusted import AdjustedTensors, LayerTensors
from .baselines import AdaRound, Compensate
from .baselines.equalize import (
    ChannelMaxima,
    changed_floats,
    equalized,
    factors,
    find_sites,
)
from .baselines.offset import (
    LOWEST_GELU,
    ShiftedObserver,
    behind_gelu,
    lopsided_range,
)
from .calibrators import clipped_mse
from .histogram import Histogram
from .layers import Layer
from .packing import packed_size
from .plan import LayerPlan, LayerQuant, QuantizationPlan, UnitPlan
from .runtime import runtimes_with
from .search import Evaluate, Score
from .search.mixed import Option, choose_bits, harms
from .simulate import Simulator

if TYPE_CHECKING:
    from .stage import Calibration, Stage

FLOAT_BITS = 16
# Of a layer in the file: its description, the names of its tensors.
_HEADER_BYTES = 700


def make_plus_plan(
    stage: "Stage", weights: str, calibration: "Calibration"
) -> tuple[QuantizationPlan, dict[str, Histogram]]:
    """Makes the plan of ``method: stablequant_plus``.

    Arguments
    ---------
    stage : Stage
        The recogniser, its configuration and its layers.
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
    """The float model as it is being quantized, equalised or not."""

    weights: str
    calibration: "Calibration"
    shifted: Mapping[str, Histogram] = field(default_factory=dict)

    @property
    def histograms(self) -> dict[str, Histogram]:
        return self.calibration.histograms


class _Plus:
    def __init__(self, stage: "Stage", weights: str, calibration):
        self.stage = stage
        self.config = stage.config
        self.plus = stage.config.plus
        self.original = _State(weights, calibration)
        self.parts: list[dict] = []
        self.evaluations = 0
        self.gelu: set[str] = set()
        if self.plus.asymmetric:
            self.gelu = behind_gelu(stage.encoders, stage.layers)

    def make(self) -> tuple[QuantizationPlan, dict[str, Histogram]]:
        sites = find_sites(self.stage.encoders, self.stage.layers)
        strength, context = 0.0, nullcontext
        if self.plus.equalize and sites:
            strength, context = self._best_strength(sites)
        with context():
            self.stage.simulator = Simulator(self.stage.layers)
            state = self._state(strength)
            try:
                return self._decide(state, sites if strength else [])
            finally:
                self.stage.simulator = Simulator(self.stage.layers)

    # -- equalisation ------------------------------------------------------

    def _best_strength(self, sites) -> tuple[float, partial]:
        """The strength with the fewest word errors, then the least loss."""
        stage = self.stage
        maxima = ChannelMaxima([site.consumers[0] for site in sites])
        with maxima.watch():
            stage.recogniser.forward("calibration", lambda _: None)
        best: tuple | None = None
        for strength in sorted({0.0, *self.plus.strengths}):
            by_site = {
                site.name: factors(
                    site, maxima.values[site.consumers[0].name], strength
                )
                for site in sites
            }
            context = partial(equalized, sites, by_site)
            with context() if strength else nullcontext():
                stage.simulator = Simulator(stage.layers)
                state = self._state(strength)
                quants = {
                    layer.name: self._quant(layer, state, 100.0)
                    for layer in stage.layers
                }
                score = self._measure(
                    state, quants, "equalize", strength=strength
                )
            rank = (score.errors, score.loss, strength)
            if best is None or rank < best[0]:
                best = rank, strength, context if strength else nullcontext
        stage.simulator = Simulator(stage.layers)
        return best[1], best[2]

    def _state(self, strength: float) -> _State:
        """Fingerprint and histograms of the model as it is now."""
        stage, state = self.stage, self.original
        if strength:
            weights = stage.fingerprint()
            file = f"histograms_equalized_{strength:g}.json"
            state = _State(weights, stage.calibrate(weights, file))
        if self.gelu:
            layers = [x for x in stage.layers if x.name in self.gelu]
            file = f"histograms_shifted_{strength:g}.json"
            shifted = stage.calibrate(
                state.weights, file, layers, ShiftedObserver
            )
            state = _State(state.weights, state.calibration, shifted.histograms)
        return state

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
            upper = shifted.quantile(ratio) + LOWEST_GELU
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
                shifted.quantile(ratio) + LOWEST_GELU,
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
        baseline, units = self._units(state)
        cutoffs = {unit.name: unit.cutoff for unit in units}
        bits = self._bits(state, baseline, cutoffs)
        quants = {
            layer.name: self._quant(
                layer, state, cutoffs[layer.unit], bits.get(layer.unit)
            )
            for layer in stage.layers
            if bits.get(layer.unit) != FLOAT_BITS
        }
        score = self._measure(state, quants, "scales")
        tensors: dict[str, LayerTensors] = {}
        rounds = plus.compensate or plus.adaround
        if sites or rounds or plus.bias_correction:
            tensors = self._round(state, quants, units)
        if rounds or plus.bias_correction:
            stage.simulator.tensors = tensors
            score = self._measure(state, quants, "rounding and biases", tensors)
        floats = changed_floats(sites, quants)
        adjusted = AdjustedTensors(tensors, floats)
        layers = [
            self._layer_plan(layer, state, cutoffs, quants.get(layer.name))
            for layer in stage.layers
        ]
        search = {
            "num_utterances": len(stage.recogniser.ids("search")),
            "metric": self.config.search.metric,
            "selection": self.config.search.selection,
            "level": self.config.search.level,
            "threshold": self.config.search.threshold,
            "evaluations": self.evaluations,
            "baseline_wer": baseline.wer,
            "final_wer": score.wer,
            "parts": self.parts,
            "runtimes": self._runtimes(quants),
        }
        plan = stage.assemble(self.original.weights, units, layers, search)
        plan = QuantizationPlan(
            **{**vars(plan), "tensors": adjusted if adjusted else None}
        )
        return plan, state.histograms

    def _units(self, state: _State) -> tuple[Score, list[UnitPlan]]:
        stage = self.stage
        evaluate, journal, bar = stage.search_evaluate(
            state.weights, state.calibration
        )
        if self.plus.cutoffs:
            baseline, units = stage.search_units(
                evaluate, bar, partial(self._cut_quant, state)
            )
        else:
            with bar:
                baseline = evaluate({}, label="float")
            units = [UnitPlan(name) for name in stage.units]
        self.evaluations += journal.measured + journal.reused
        return baseline, units

    def _bits(
        self, state: _State, baseline: Score, cutoffs: Mapping[str, float]
    ) -> dict[str, int]:
        """Bits by unit under the budget; empty without one."""
        budget, stage = self.plus.budget, self.stage
        if budget.size is None:
            return {}
        evaluate, journal, bar = stage.search_evaluate(
            state.weights, state.calibration
        )
        widths = sorted(set(budget.bits))
        options = {}
        with bar:
            bar.total = 1 + len(stage.units) * len(
                [b for b in widths if b != FLOAT_BITS]
            )
            evaluate({}, label="float")
            for unit, layers in stage.units.items():
                options[unit] = [
                    self._option(
                        state,
                        unit,
                        layers,
                        cutoffs[unit],
                        b,
                        evaluate,
                        baseline,
                    )
                    for b in widths
                ]
        self.evaluations += journal.measured + journal.reused
        room = self._room(budget.size)
        chosen = choose_bits(options, room)
        found = harms(options)
        self.parts.append(
            {
                "part": "budget",
                "size": budget.size,
                "bytes": room,
                "units": {
                    unit: {
                        "bits": chosen[unit],
                        "options": [
                            {**asdict(option), "harm": harm}
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

    def _option(
        self,
        state: _State,
        unit: str,
        layers: list[Layer],
        cutoff: float,
        bits: int,
        evaluate: Evaluate,
        baseline: Score,
    ) -> Option:
        if bits == FLOAT_BITS:
            return Option(bits, self._size(layers, bits), 0.0, 0.0)
        quants = {x.name: self._quant(x, state, cutoff, bits) for x in layers}
        label = f"{unit} at {bits} bits"
        score = evaluate(quants, start=unit, label=label)
        return Option(
            bits,
            self._size(layers, bits),
            score.wer - baseline.wer,
            score.loss - baseline.loss,
        )

    def _size(self, layers: list[Layer], bits: int) -> int:
        """Bytes of layers on disk, biases not counted."""
        size = 0
        for layer in layers:
            if bits == FLOAT_BITS:
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
        modules = self.stage.recogniser.modules
        counts: dict[int, int] = {}
        for key in self.config.target:
            for parameter in modules[key].parameters():
                counts[id(parameter)] = parameter.numel()
        every = sum(counts.values())
        rest = every - sum(layer.numel for layer in self.stage.layers)
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

        return self.stage.refine(
            state.weights,
            state.calibration.in_order,
            quants,
            "plus",
            solve,
            lambda layer: plus.bias_correction and layer.name not in without,
        )

    def _biases_without_effect(self) -> set[str]:
        """Convolutions whose output is normalised over time by channel."""
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
    ) -> Score:
        """Measures the whole model, and writes down what a part brought."""
        weights = state.weights
        if tensors:
            weights += AdjustedTensors(dict(tensors)).digest()
        evaluate, journal, bar = self.stage.search_evaluate(
            weights, state.calibration
        )
        words = " ".join([part, *(f"{value:g}" for value in values.values())])
        with bar:
            score = evaluate(quants, label=words)
        self.evaluations += journal.measured + journal.reused
        self.parts.append(
            {
                "part": part,
                **values,
                "wer": score.wer,
                "secondary": score.to_dict()["loss"],
            }
        )
        return score

    def _layer_plan(
        self,
        layer: Layer,
        state: _State,
        cutoffs: Mapping[str, float],
        quant: LayerQuant | None,
    ) -> LayerPlan:
        cutoff = cutoffs[layer.unit]
        if quant is None:
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
        return runtimes_with(frozenset().union(*needs))
