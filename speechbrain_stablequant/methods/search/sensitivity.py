"""Step 1, layer selection: units that are sensitive when quantized alone."""

import math
from collections.abc import Mapping

from ...config import SearchConfig
from ...core.error_rates import DeltaInterval
from ...core.layer_quant import LayerQuant
from ...core.plan import UnitPlan
from .paired import loss_rise, wer_rise
from .score import Evaluate, Score


def select_units(
    units: Mapping[str, Mapping[str, LayerQuant]],
    evaluate: Evaluate,
    search: SearchConfig,
) -> tuple[Score, list[UnitPlan]]:
    """Measures every unit alone and selects the sensitive ones; returns the
    float model's score and the units. ``units``: for each, in network order,
    its layers without clipping."""
    baseline = evaluate({}, label="float")
    found = []
    for name, quants in units.items():
        score = evaluate(quants, start=name, label=f"{name} alone")
        interval = wer_rise(baseline, score, search.level)
        if search.selection == "interval":
            selected = _is_surely_worse(baseline, score, interval, search)
        else:
            selected = _is_worse(baseline, score, search.threshold)
        rise = score.wer - baseline.wer
        ends = interval and [interval.low, interval.high]
        found.append(UnitPlan(name, score.wer, rise, ends, selected))
    return baseline, found


def _is_worse(baseline: Score, score: Score, threshold: float) -> bool:
    # In whole words, so that rounding of rates does not decide.
    more = 100 * (score.errors - baseline.errors)
    return more > threshold * baseline.words


def _is_surely_worse(
    baseline: Score,
    score: Score,
    interval: DeltaInterval | None,
    search: SearchConfig,
) -> bool:
    """Whether the whole interval of the rise is above the threshold; if it
    contains it, whether the loss rises surely, and by as much."""
    threshold = search.threshold
    if interval is None:
        raise ValueError(
            "quantize.search.selection: interval needs errors by utterance, "
            "which the recipe's metric does not count; use selection: threshold"
        )
    if not interval.low <= threshold < interval.high:
        return _is_worse(baseline, score, threshold)
    loss = loss_rise(baseline, score, search.level)
    if loss is None or loss.low <= 0 or not 0 < baseline.loss < math.inf:
        return False
    # Points of WER for one unit of loss, if both rise in proportion.
    return baseline.wer / baseline.loss * loss.delta > threshold
