"""One calibrator for every layer: max, percentile, entropy or mse."""

from ..config import MethodConfig
from ..core.calibrators import CALIBRATORS
from ..core.plan import UnitPlan
from ..utils.progress import progress_bar
from .session.histograms import Calibration
from .session.session import Planned, Session


class PercentileConfig(MethodConfig):
    """``method: percentile`` has its option in ``quantize.calibration``."""

    also_reads = ("calibration.percentile",)


def calibrator_plan(
    session: Session,
    weights: str,
    calibration: Calibration,
    method: str | None = None,
    then: str = " of every layer",
) -> Planned:
    """The range of each layer's input by one calibrator; ``then``: how the
    reason of each goes on."""
    config = session.config
    method = method or config.method
    options = {}
    if method == "percentile":
        options["percentile"] = config.calibration.percentile
    own = "mse" if method == "mse" else "max"
    weight_method = config.weight_method or own
    quants = {}
    shown = session.recognizer.show_progress
    for layer in progress_bar(session.layers, "calibrators", shown):
        histogram = calibration.histograms[layer.name]
        bits = config.activation_bits
        amax = CALIBRATORS[method](histogram, bits, **options)
        quants[layer.name] = session.quant(layer.name, amax, weight_method)
    return session.assemble(
        weights,
        units=[UnitPlan(name) for name in session.units],
        quants=quants,
        histograms=calibration.histograms,
        residual_amax=calibration.residual,
        cutoffs=dict.fromkeys(quants, options.get("percentile", 100.0)),
        reason=lambda _: f"{method} calibration{then}",
        search={},
    )
