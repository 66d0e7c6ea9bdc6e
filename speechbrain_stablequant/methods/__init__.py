"""Methods that decide the numbers of a plan, one module each."""

from dataclasses import replace

from ..core.histogram import Histogram
from ..core.plan import QuantizationPlan
from .adaround import adaround_plan
from .calibrator import calibrator_plan
from .given import given_plan
from .plus.plan import plus_plan
from .qat.plan import qat_plan
from .session import Session, calibrate
from .stablequant import stablequant_plan

__all__ = ["make_plan"]


def make_plan(
    session: Session,
) -> tuple[QuantizationPlan, dict[str, Histogram]]:
    """Makes the plan of a block: calibrates and searches, or reads one.

    Arguments
    ---------
    session : Session
        The recognizer, its layers and its config.

    Returns
    -------
    QuantizationPlan
        The plan.
    dict
        Histograms of the layers' inputs; empty for a given plan.

    Raises
    ------
    ValueError
        A plan of another model, a layer that is never called, NaN.
    """
    plan, histograms = _make_plan(session)
    # All runs keep their tensors to the end: not on the device.
    tensors = plan.tensors and plan.tensors.cpu()
    return replace(plan, tensors=tensors), histograms


def _make_plan(
    session: Session,
) -> tuple[QuantizationPlan, dict[str, Histogram]]:
    config = session.config
    weights = session.fingerprint()
    if config.plan is not None:
        return given_plan(session, weights), {}
    calibration = calibrate(session, weights)
    histograms = calibration.histograms
    if config.method == "stablequant_plus":
        return plus_plan(session, weights, calibration)
    if config.method == "stablequant":
        plan = stablequant_plan(session, weights, calibration)
    elif config.method == "adaround":
        plan = adaround_plan(session, weights, calibration)
    elif config.method == "qat":
        start = calibrator_plan(
            session, weights, histograms, config.qat.calibrator
        )
        plan = qat_plan(session, start)
    else:
        plan = calibrator_plan(session, weights, histograms, config.method)
    return plan, histograms
