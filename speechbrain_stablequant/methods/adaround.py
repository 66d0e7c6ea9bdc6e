"""``method: adaround``: adaptive rounding on the scales of a calibrator."""

from dataclasses import asdict, dataclass, replace

from ..config import MethodConfig
from ..core.calibrators import CALIBRATORS
from ..core.histogram import Histogram
from ..core.plan import QuantizationPlan
from ..core.plan_tensors import AdjustedTensors
from ..utils.typed import choice, count, fraction, positive
from .calibrator import calibrator_plan
from .layerwise import AdaRound, rounded_layers
from .session import Calibration, Session


@dataclass(frozen=True)
class AdaRoundConfig(MethodConfig):
    """``quantize.adaround``: adaptive rounding, with AIMET's settings.

    The loss is a quadratic form in the Hessian of the whole calibration set,
    so there is no batch size.

    Arguments
    ---------
    iterations : int
        Steps for each layer.
    lr : float
        Learning rate.
    weight : float
        Weight of the regularizer that drives each rounding to 0 or 1.
    beta_start, beta_end : float
        First and last exponent of the regularizer.
    warm_start : float
        Fraction of the steps without the regularizer.
    calibrator : str
        Calibrator of the activations: ``max``, ``percentile``, ``entropy`` or
        ``mse``.
    """

    block = "adaround"

    iterations: int = count(10000)
    lr: float = positive(0.01)
    weight: float = positive(0.01)
    beta_start: float = positive(20.0)
    beta_end: float = positive(2.0)
    warm_start: float = fraction(0.2)
    calibrator: str = choice("mse", *CALIBRATORS)

    def solver(self) -> AdaRound:
        """Rounds a layer with these settings."""
        settings = asdict(self)
        del settings["calibrator"]
        return AdaRound(**settings)


def adaround_plan(
    session: Session, weights: str, calibration: Calibration
) -> tuple[QuantizationPlan, dict[str, Histogram]]:
    """Learns for each weight whether it is rounded up or down."""
    options = session.config.adaround
    plan, histograms = calibrator_plan(
        session, weights, calibration, options.calibrator
    )
    tensors = rounded_layers(
        session,
        weights,
        calibration.in_order,
        plan.quants(),
        "adaround",
        lambda _: options.solver(),
    )
    reason = f"{options.calibrator} calibration, then adaptive rounding"
    layers = [replace(layer, reason=reason) for layer in plan.layers]
    tensors = AdjustedTensors(layers=tensors)
    return replace(plan, layers=layers, tensors=tensors), histograms
