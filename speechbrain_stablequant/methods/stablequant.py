"""StableQuant (ICASSP 2025): selection by WER, clipping, least squared error.

1. Each unit is quantized alone without clipping; it is selected if the WER of
   the search set rises too much.
2. For each selected unit, in network order, the clipping percentile with the
   lowest WER, then the lowest loss.
3. For each layer the range of least squared error below its percentile.
4. The original model is quantized with these scales.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from tqdm import tqdm

from ..config import MethodConfig
from ..core.calibrators import clipped_mse
from ..core.histogram import Histogram
from ..core.layer_quant import LayerQuant
from ..core.plan import LayerPlan, QuantizationPlan, UnitPlan
from ..model.layers import Layer
from .search import Evaluate, Score, search_cutoffs, select_units
from .session import Calibration, Session, search_evaluate

logger = logging.getLogger(__name__)


class StableQuantConfig(MethodConfig):
    """``method: stablequant`` has its options in ``quantize.search``."""

    sets: ClassVar[Mapping[str, bool]] = {"search": True}


def stablequant_plan(
    session: Session, weights: str, calibration: Calibration
) -> tuple[QuantizationPlan, dict[str, Histogram]]:
    """Makes the plan of ``method: stablequant``; its ``search`` has the word
    error rates before and after."""
    config = session.config
    histograms = calibration.histograms
    evaluate, journal, bar = search_evaluate(session, weights, calibration)
    started = time.monotonic()
    baseline, units = search_units(
        session,
        evaluate,
        bar,
        lambda layer, ratio: session.quant(
            histograms[layer.name].quantile(ratio / 100), "max"
        ),
    )
    layers = _final_layers(session, units, histograms)
    final = evaluate(
        {layer.name: layer.quant for layer in layers}, label="final"
    )
    logger.info(
        "search: %d evaluations, %d of them from %s, %.0f s",
        journal.measured + journal.reused,
        journal.reused,
        journal.file,
        time.monotonic() - started,
    )
    search = {
        "num_utterances": len(session.recognizer.ids("search")),
        "metric": config.search.metric,
        "selection": config.search.selection,
        "level": config.search.level,
        "threshold": config.search.threshold,
        "evaluations": journal.measured + journal.reused,
        "baseline_wer": baseline.wer,
        "final_wer": final.wer,
    }
    plan = session.assemble(weights, units, layers, search)
    return plan, histograms


def search_units(
    session: Session,
    evaluate: Evaluate,
    bar: tqdm,
    quantize: Callable[[Layer, float], LayerQuant],
) -> tuple[Score, list[UnitPlan]]:
    """Steps 1 and 2: selection of units and their clipping percentiles.

    ``quantize`` gives a layer's quant at a percentile; ``bar`` is closed at the
    end. Returns the float model's score and a plan of each unit.
    """
    search = session.config.search

    def cut_unit(unit: str, ratio: float) -> dict[str, LayerQuant]:
        return {
            layer.name: quantize(layer, ratio) for layer in session.units[unit]
        }

    with bar:
        bar.total = 1 + len(session.units)
        baseline, units = select_units(
            {unit: cut_unit(unit, 100.0) for unit in session.units},
            evaluate,
            search,
        )
        selected = sum(unit.selected for unit in units)
        bar.total += selected * len(search.cutoffs)
        bar.refresh()
        return baseline, search_cutoffs(units, cut_unit, evaluate, search)


def _final_layers(
    session: Session,
    units: Iterable[UnitPlan],
    histograms: Mapping[str, Histogram],
) -> list[LayerPlan]:
    """Step 3: scales of least squared error below the clipping percentiles."""
    bits = session.config.activation_bits
    weight_method = session.config.weight_method or "mse"
    by_name = {unit.name: unit for unit in units}
    layers = []
    for layer in session.layers:
        unit = by_name[layer.unit]
        histogram = histograms[layer.name]
        edge = histogram.quantile(unit.cutoff / 100)
        amax = clipped_mse(histogram, edge, bits)
        if unit.selected:
            reason = (
                f"unit selected (WER +{unit.delta_wer:.2f} alone), cut "
                f"at {unit.cutoff:g} %, then smallest squared error"
            )
        else:
            reason = (
                f"unit not selected (WER {unit.delta_wer:+.2f} alone), "
                "smallest squared error"
            )
        layers.append(
            LayerPlan(
                name=layer.name,
                unit=layer.unit,
                kind=layer.kind,
                quant=session.quant(amax, weight_method),
                observed_max=histogram.max,
                cutoff=unit.cutoff,
                reason=reason,
            )
        )
    return layers
