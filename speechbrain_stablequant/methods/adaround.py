"""``method: adaround``: adaptive rounding on the scales of a calibrator."""

from dataclasses import asdict, replace

from ..core.plan import QuantizationPlan
from ..core.plan_tensors import AdjustedTensors
from .calibrator import calibrator_plan
from .layerwise import AdaRound, rounded_layers
from .session import Calibration, Session


def adaround_plan(
    session: Session, weights: str, calibration: Calibration
) -> QuantizationPlan:
    """Learns for each weight whether it is rounded up or down."""
    settings = asdict(session.config.adaround)
    calibrator = settings.pop("calibrator")
    plan = calibrator_plan(session, weights, calibration.histograms, calibrator)
    solve = AdaRound(**settings)
    tensors = rounded_layers(
        session,
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
    return replace(plan, layers=layers, tensors=AdjustedTensors(layers=tensors))
