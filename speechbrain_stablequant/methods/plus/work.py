"""What the parts of StableQuant-plus share: decisions so far, measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...core.affine import GELU_MIN
from ...core.calibrators import clipped_mse
from ...core.histogram import Histogram
from ...core.layer_quant import LayerQuant, LayerTensors
from ...core.plan_tensors import AdjustedTensors
from ...model.layers import Layer, layer_names
from ...simulation.observers import Observer
from ..search.score import Evaluate, Score, finite
from ..session.calibration import Calibration, calibrations
from ..session.search_set import SearchSet
from ..session.session import Session
from .quarot import can_rotate
from .zero_point import ShiftedObserver, asymmetric_range, behind_gelu


@dataclass(frozen=True)
class InputHarm:
    """The divergence that quantized inputs cause in layers that share them."""

    layers: Sequence[Layer]
    divergence: float


class Work:
    """One run of StableQuant-plus: what was decided, and what it brought."""

    def __init__(
        self, session: Session, weights: str, calibration: Calibration
    ):
        plus = session.config.plus
        self.session, self.search_set = session, SearchSet(session)
        #: Of the model before rotation and equalization.
        self.first_weights, self.first_calibration = weights, calibration
        #: Of its present form, see :meth:`calibrate`.
        self.weights, self.calibration = weights, calibration
        #: Histograms of ``input - GELU_MIN``, for layers behind a GELU.
        self.shifted: dict[str, Histogram] = {}
        self.rotated = [
            e for e in session.encoders if plus.rotate and can_rotate(e)
        ]
        #: Layers that stay float, with the reason.
        self.float_layers: dict[str, str] = {}
        if plus.keep_first_conv_float:
            self.float_layers = dict.fromkeys(
                _first_convs(session),
                "stays float: it takes in the audio itself",
            )
        self.behind_gelu: set[str] = set()
        if plus.asymmetric:
            self.behind_gelu = behind_gelu(session.encoders, session.layers)
        #: Layers by unit, without those that stay float.
        self.units = {
            unit: [x for x in layers if x.name not in self.float_layers]
            for unit, layers in session.units.items()
        }
        #: Clipping percentile by layer.
        self.percentiles = {layer.name: 100.0 for layer in session.layers}
        self.bits: dict[str, int] = {}  #: bits by unit, of a mixed precision
        #: Layers whose inputs stay float, with the reason.
        self.float_inputs: dict[str, str] = {}
        #: What was measured of each part of the pipeline, for the plan.
        self.measured: list[dict] = []

    def calibrate(self, strength: float) -> None:
        """Calibrates the model as it is now, equalized by a strength."""
        session = self.session
        session.simulator.reset()
        suffix = "_rotated" if self.rotated else ""
        if strength:
            suffix += f"_equalized_{strength:g}"
        self.weights = session.fingerprint() if suffix else self.first_weights
        wanted = {f"histograms{suffix}.json": (session.layers, Observer)}
        if self.behind_gelu:
            layers = [x for x in session.layers if x.name in self.behind_gelu]
            file = f"histograms{suffix}_shifted.json"
            wanted[file] = (layers, ShiftedObserver)
        self.calibration, *shifted = calibrations(session, self.weights, wanted)
        self.shifted = shifted[0].histograms if shifted else {}

    def quant(
        self,
        layer: Layer,
        percentile: float,
        bits: int | None = None,
        least_error: bool = True,
    ) -> LayerQuant:
        """Scales of least squared error, or of the range below a percentile."""
        config, ratio = self.session.config, percentile / 100
        activation_bits = max(bits or 0, config.activation_bits)
        zero_point, shifted = 0.0, self.shifted.get(layer.name)
        if shifted is not None:
            upper = shifted.quantile(ratio) + GELU_MIN
            amax, zero_point = asymmetric_range(
                shifted, activation_bits, upper, least_error
            )
        else:
            histogram = self.calibration.histograms[layer.name]
            amax = histogram.quantile(ratio)
            if least_error:
                amax = clipped_mse(histogram, amax, activation_bits)
        quant = self.session.quant(
            layer.name,
            amax,
            (config.weight_method or "mse") if least_error else "max",
            (bits or config.weight_bits, activation_bits),
            zero_point,
        )
        stays = layer.name in self.float_inputs
        return quant.with_float_input() if stays else quant

    def quants(self) -> dict[str, LayerQuant]:
        return {
            x.name: self.quant(
                x, self.percentiles[x.name], self.bits.get(x.unit)
            )
            for x in self.session.layers
            if x.name not in self.float_layers
        }

    def evaluator(
        self,
        metric: str | None = None,
        tensors: Mapping[str, LayerTensors] | None = None,
    ) -> Evaluate:
        self.session.simulator.tensors = dict(tensors or {})
        weights = self.weights
        if tensors:
            weights += AdjustedTensors(dict(tensors)).digest()
        return self.search_set.evaluator(weights, self.calibration, metric)

    def divergence(
        self,
        quants: Mapping[str, LayerQuant],
        part: str,
        tensors: Mapping[str, LayerTensors] | None = None,
        **values: float,
    ) -> float:
        """Divergence of the quantized model, recorded under a part's name."""
        words = " ".join([part, *(f"{value:g}" for value in values.values())])
        evaluate = self.evaluator("divergence", tensors)
        ranked = self.session.recognizer.ranked
        with self.search_set.bar_of_one(words, ranked):
            found = evaluate(quants, label=words).loss
        row = {"part": part, **values, "divergence": finite(found)}
        self.measured.append(row)
        return found

    def word_errors(
        self,
        quants: Mapping[str, LayerQuant],
        tensors: Mapping[str, LayerTensors],
    ) -> tuple[Score, Score]:
        # Rotation and equalization do not change the float model's output.
        evaluate = self.search_set.evaluator(
            self.first_weights, self.first_calibration
        )
        with self.search_set.bar_of_one("the float model"):
            baseline = evaluate({}, label="float")
        evaluate = self.evaluator(tensors=tensors)
        with self.search_set.bar_of_one("the whole plan"):
            return baseline, evaluate(quants, label="final")


def _first_convs(session: Session) -> set[str]:
    """The first convolution of each encoder, whose input is the audio."""
    extractors = (x.model.feature_extractor for x in session.encoders)
    first = (extractor.conv_layers[0].conv for extractor in extractors)
    return layer_names(session.layers, first)
