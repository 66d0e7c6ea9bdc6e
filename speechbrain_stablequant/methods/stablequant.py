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

from ..config import MethodConfig
from ..core.calibrators import clipped_mse
from ..core.histogram import Histogram
from ..core.layer_quant import LayerQuant
from ..core.plan import UnitPlan
from ..model.layer import Layer
from ..model.layers import group_units
from .search import SEARCH_KEYS
from .search.journal import JOURNAL_FILE
from .search.percentile import search_percentiles
from .search.score import Evaluate, Score
from .search.sensitivity import select_units
from .session.histograms import Calibration
from .session.search_set import SearchSet
from .session.session import Planned, Session

logger = logging.getLogger(__name__)


class StableQuantConfig(MethodConfig):
    """``method: stablequant`` has its options in ``quantize.search``."""

    also_reads = SEARCH_KEYS
    sets: ClassVar[Mapping[str, bool]] = {"search": True}


def stablequant_plan(
    session: Session, weights: str, calibration: Calibration
) -> Planned:
    """Makes the plan of ``method: stablequant``."""
    histograms = calibration.histograms
    search_set, rank = SearchSet(session), None
    if session.by_divergence:
        search_set.keep_float_outputs()
        rank = search_set.evaluator(weights, calibration, "divergence")
    evaluate = search_set.evaluator(weights, calibration)
    started = time.monotonic()
    baseline, units = search_units(
        search_set,
        evaluate,
        rank,
        lambda layer, percentile: session.quant(
            layer.name, histograms[layer.name].quantile(percentile / 100), "max"
        ),
    )
    cutoffs = layer_cutoffs(session, units)
    quants = _final_quants(session, cutoffs, histograms)
    with search_set.bar_of_one("the whole plan"):
        final = evaluate(quants, label="final")
    reused = sum(journal.reused for journal in search_set.journals)
    earlier = f", {reused} of them of earlier runs in {JOURNAL_FILE}"
    logger.info(
        "search: %d evaluations%s, %.0f s",
        search_set.evaluations,
        earlier if reused else "",
        time.monotonic() - started,
    )
    reasons = {x.name: _reason(x) for x in units if x.wer is not None}
    return session.assemble(
        weights,
        units=units,
        quants=quants,
        histograms=histograms,
        residual_amax=calibration.residual,
        cutoffs=cutoffs,
        reason=lambda layer: reasons[layer.unit],
        search=search_set.record(baseline, final) | selection_rules(session),
    )


def selection_rules(session: Session) -> dict:
    """What a plan's search says of step 1; the report explains it by these."""
    search = session.config.search
    keys = ("selection", "level", "threshold")
    return {key: getattr(search, key) for key in keys}


def search_units(
    search_set: SearchSet,
    evaluate: Evaluate,
    rank: Evaluate | None,
    quantize: Callable[[Layer, float], LayerQuant],
) -> tuple[Score, list[UnitPlan]]:
    """Steps 1 and 2: the float model's score, and a plan of each unit.

    ``quantize`` gives a layer's quant at a percentile; ``rank`` compares
    candidates, by default ``evaluate``. Units without an input to clip are not
    searched.
    """
    session = search_set.session
    search = session.config.search
    searched = group_units(session.clipped_layers)

    def cut_unit(unit: str, percentile: float) -> dict[str, LayerQuant]:
        return {
            layer.name: quantize(layer, percentile)
            for layer in session.units[unit]
        }

    with search_set.bar("each unit alone", 1 + len(searched)):
        baseline, units = select_units(
            {unit: cut_unit(unit, 100.0) for unit in searched},
            evaluate,
            search,
        )
    selected = sum(unit.selected for unit in units)
    if selected:
        steps, what = len(search.cutoffs), "clipping percentiles"
        if rank:
            # Two more confirm a unit's choice, where it clips.
            steps, what = steps + 2, f"{what} (at most)"
        with search_set.bar(what, selected * steps):
            units = search_percentiles(units, cut_unit, evaluate, search, rank)
    found = {unit.name: unit for unit in units}
    return baseline, [found.get(n) or UnitPlan(n) for n in session.units]


def layer_cutoffs(
    session: Session, units: Iterable[UnitPlan]
) -> dict[str, float]:
    """The clipping percentile of each layer's unit, by layer."""
    by_unit = {unit.name: unit.cutoff for unit in units}
    return {layer.name: by_unit[layer.unit] for layer in session.layers}


def _final_quants(
    session: Session,
    cutoffs: Mapping[str, float],
    histograms: Mapping[str, Histogram],
) -> dict[str, LayerQuant]:
    """Step 3: scales of least squared error below the clipping percentiles."""
    bits = session.config.activation_bits
    weight_method = session.config.weight_method or "mse"
    quants = {}
    for name, cutoff in cutoffs.items():
        histogram = histograms[name]
        amax = clipped_mse(histogram, histogram.quantile(cutoff / 100), bits)
        quants[name] = session.quant(name, amax, weight_method)
    return quants


def _reason(unit: UnitPlan) -> str:
    if not unit.selected:
        return (
            f"unit not selected (WER {unit.delta_wer:+.2f} alone), "
            "smallest squared error"
        )
    return (
        f"unit selected (WER +{unit.delta_wer:.2f} alone), cut "
        f"at {unit.cutoff:g} %, then smallest squared error"
    )
