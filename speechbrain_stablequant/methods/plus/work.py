"""What all parts of StableQuant-plus share, and how they are measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tqdm import tqdm

from ...core.histogram import Histogram
from ...core.layer_quant import LayerQuant, LayerTensors
from ...core.plan_tensors import AdjustedTensors
from ...simulation.fake_quant import Simulator
from ...simulation.observers import Observer
from ..search import Evaluate, Score
from ..session import Calibration, Session, calibrations, search_evaluate
from .quarot import can_rotate
from .zero_point import ShiftedObserver, behind_gelu


@dataclass
class FloatModel:
    """The float model in one form (rotated or not, equalized or not)."""

    weights: str
    calibration: Calibration
    #: Of ``input - GELU_MIN``, for layers behind a GELU.
    shifted: Mapping[str, Histogram] = field(default_factory=dict)

    @property
    def histograms(self) -> dict[str, Histogram]:
        """Histogram of |input| by layer name."""
        return self.calibration.histograms


class Work:
    """One run of StableQuant-plus: its layers and the effect of each part."""

    def __init__(
        self, session: Session, weights: str, calibration: Calibration
    ):
        plus = session.config.plus
        self.session = session
        self.original = FloatModel(weights, calibration)
        self.rotated = [
            e for e in session.encoders if plus.rotate and can_rotate(e)
        ]
        self.float_layers: set[str] = set()
        if plus.keep_first_conv_float:
            self.float_layers = _first_convs(session)
        self.behind_gelu: set[str] = set()
        if plus.asymmetric:
            self.behind_gelu = behind_gelu(session.encoders, session.layers)
        #: Layers by unit, without those that stay float.
        self.units = {
            unit: [x for x in layers if x.name not in self.float_layers]
            for unit, layers in session.units.items()
        }
        #: What each part brought, for the plan.
        self.parts: list[dict] = []
        self.evaluations = 0

    def reset_simulator(self) -> None:
        """Drops the fake-quantized weights of another form of the model."""
        self.session.simulator = Simulator(self.session.layers)

    def model_now(self, strength: float) -> FloatModel:
        """The float model in its present form, equalized by a strength."""
        self.reset_simulator()
        session = self.session
        suffix = "_rotated" if self.rotated else ""
        if strength:
            suffix += f"_equalized_{strength:g}"
        weights = session.fingerprint() if suffix else self.original.weights
        wanted = {f"histograms{suffix}.json": (session.layers, Observer)}
        if self.behind_gelu:
            layers = [x for x in session.layers if x.name in self.behind_gelu]
            file = f"histograms{suffix}_shifted.json"
            wanted[file] = (layers, ShiftedObserver)
        calibration, *shifted = calibrations(session, weights, wanted)
        return FloatModel(
            weights, calibration, shifted[0].histograms if shifted else {}
        )

    def evaluator(
        self,
        model: FloatModel,
        metric: str | None = None,
        tensors: Mapping[str, LayerTensors] | None = None,
    ) -> tuple[Evaluate, tqdm]:
        """Measures a model with decided tensors; counts the evaluations."""
        self.session.simulator.tensors = dict(tensors or {})
        weights = model.weights
        if tensors:
            weights += AdjustedTensors(dict(tensors)).digest()
        evaluate, _, bar = search_evaluate(
            self.session, weights, model.calibration, metric
        )

        def counted(*args, **options) -> Score:
            self.evaluations += 1
            return evaluate(*args, **options)

        return counted, bar

    def divergence(
        self,
        model: FloatModel,
        quants: Mapping[str, LayerQuant],
        part: str,
        tensors: Mapping[str, LayerTensors] | None = None,
        **values: float,
    ) -> float:
        """Divergence of the quantized model, recorded under a part's name."""
        words = " ".join([part, *(f"{value:g}" for value in values.values())])
        evaluate, bar = self.evaluator(model, "divergence", tensors)
        with bar:
            found = evaluate(quants, label=words).loss
        self.parts.append({"part": part, **values, "divergence": found})
        return found

    def word_errors(
        self,
        model: FloatModel,
        quants: Mapping[str, LayerQuant],
        tensors: Mapping[str, LayerTensors],
    ) -> tuple[Score, Score]:
        """Scores of the float model and of the quantized one."""
        # Rotation and equalization do not change the float model's output.
        evaluate, bar = self.evaluator(self.original)
        with bar:
            baseline = evaluate({}, label="float")
        evaluate, bar = self.evaluator(model, None, tensors)
        with bar:
            return baseline, evaluate(quants, label="final")


def _first_convs(session: Session) -> set[str]:
    """The first convolution of each encoder, whose input is the audio."""
    first = {
        id(encoder.model.feature_extractor.conv_layers[0].conv)
        for encoder in session.encoders
    }
    return {layer.name for layer in session.layers if id(layer.module) in first}
