"""One calibrator for every layer: max, percentile, entropy or mse."""

from tqdm import tqdm

from ..core.calibrators import calibrate
from ..core.histogram import Histogram
from ..core.plan import LayerPlan, QuantizationPlan, UnitPlan
from .session import Calibration, Session


def calibrator_plan(
    session: Session,
    weights: str,
    calibration: Calibration,
    method: str | None = None,
) -> tuple[QuantizationPlan, dict[str, Histogram]]:
    """The range of each layer's input by one calibrator, the block's method by
    default."""
    config = session.config
    method = method or config.method
    options = {}
    if method == "percentile":
        options["percentile"] = config.calibration.percentile
    weight_method = config.weight_method or (
        "mse" if method == "mse" else "max"
    )
    layers = []
    for layer in tqdm(
        session.layers,
        "calibrators",
        disable=not session.recognizer.show_progress,
    ):
        histogram = calibration.histograms[layer.name]
        amax = calibrate(method, histogram, config.activation_bits, **options)
        layers.append(
            LayerPlan(
                name=layer.name,
                unit=layer.unit,
                kind=layer.kind,
                quant=session.quant(amax, weight_method),
                observed_max=histogram.max,
                cutoff=options.get("percentile", 100.0),
                reason=f"{method} calibration of every layer",
            )
        )
    units = [UnitPlan(name) for name in session.units]
    plan = session.assemble(weights, units, layers, {})
    return plan, calibration.histograms
