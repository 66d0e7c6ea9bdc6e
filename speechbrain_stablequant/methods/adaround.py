"""``method: adaround``: adaptive rounding on the scales of a calibrator; its
options are in ``layerwise/adaround.py``."""

from dataclasses import replace

from ..core.histogram import Histogram
from ..core.plan import QuantizationPlan
from ..core.plan_tensors import AdjustedTensors
from .calibrator import calibrator_plan
from .layerwise.reconstruct import rounded_layers
from .session.calibration import Calibration
from .session.session import Session


def adaround_plan(
    session: Session, weights: str, calibration: Calibration
) -> tuple[QuantizationPlan, dict[str, Histogram]]:
    """Learns for each weight whether it is rounded up or down."""
    options = session.config.adaround
    plan, histograms = calibrator_plan(
        session,
        weights,
        calibration,
        options.calibrator,
        ", then adaptive rounding",
    )
    tensors = rounded_layers(
        session,
        weights,
        calibration.in_order,
        plan.quants(),
        "adaround",
        lambda _: options,
    )
    tensors = AdjustedTensors(layers=tensors)
    return replace(plan, tensors=tensors), histograms
