"""Step 2, outlier removal: the clipping percentile of each selected unit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ...config import SearchConfig
from ...core.layer_quant import LayerQuant
from ...core.plan import UnitPlan
from .paired import better
from .score import Evaluate, Score, finite

Curve = Sequence[tuple[float, Score]]  #: percentiles that were tried


def best_percentile(curve: Curve) -> float:
    """Fewest word errors, then the smaller loss, then the larger percentile."""
    percentile, _ = min(
        (row for row in curve if row[1].complete),
        key=lambda row: (row[1].errors, row[1].loss, -row[0]),
    )
    return percentile


def surest_percentile(curve: Curve, level: float) -> float:
    """From the largest down, the last that beats the best beyond noise."""
    (best, fewest), *rest = sorted(curve, key=lambda row: -row[0])
    for percentile, score in rest:
        if better(score, fewest, level):
            best, fewest = percentile, score
    return best


def search_percentiles(
    units: Iterable[UnitPlan],
    quantize_unit: Callable[[str, float], Mapping[str, LayerQuant]],
    evaluate: Evaluate,
    search: SearchConfig,
    rank: Evaluate | None = None,
) -> list[UnitPlan]:
    """Searches the clipping percentile of each selected unit, in network order.

    Earlier decisions are in place, later units float. With ``rank`` a unit
    takes the percentile of the least loss in it, if its WER is not worse than
    that of the largest percentile.
    """
    decided: dict[str, LayerQuant] = {}
    by_interval = search.selection == "interval"
    found = []
    for unit in units:
        if not unit.selected:
            found.append(unit)
            continue
        curve: list[tuple[float, Score]] = []
        fewest: int | None = None

        def measure(
            percentile: float,
            by: Evaluate,
            limit: int | None,
            name: str = unit.name,
        ) -> Score:
            return by(
                {**decided, **quantize_unit(name, percentile)},
                start=name,
                give_up_above=limit,
                label=f"{name} cut at {percentile:g} %",
            )

        for percentile in sorted(search.cutoffs, reverse=True):
            limit = None if by_interval or rank else fewest
            score = measure(percentile, rank or evaluate, limit)
            curve.append((percentile, score))
            if score.complete and (fewest is None or score.errors < fewest):
                fewest = score.errors
        if rank:
            cutoff, rows = _confirmed(
                curve,
                lambda percentile: measure(percentile, evaluate, None),
                search,
            )
        else:
            rows = [_row(percentile, score) for percentile, score in curve]
            cutoff = (
                surest_percentile(curve, search.level)
                if by_interval
                else best_percentile(curve)
            )
        decided.update(quantize_unit(unit.name, cutoff))
        found.append(replace(unit, cutoff=cutoff, curve=rows))
    return found


def _confirmed(
    curve: Curve, measure: Callable[[float], Score], search: SearchConfig
) -> tuple[float, list[dict]]:
    """The least divergence's if the words agree, else the largest; all rows."""
    largest = curve[0][0]
    best, _ = min(curve, key=lambda row: (row[1].loss, -row[0]))
    rows = {
        percentile: {**_row(percentile, score), "wer": None}
        for percentile, score in curve
    }
    if best != largest:
        clipped, whole = measure(best), measure(largest)
        rows[best]["wer"], rows[largest]["wer"] = clipped.wer, whole.wer
        if search.selection == "interval":
            worse = better(whole, clipped, search.level)
        else:
            worse = clipped.errors > whole.errors
        best = largest if worse else best
    return best, list(rows.values())


def _row(percentile: float, score: Score) -> dict:
    return {
        "cutoff": percentile,
        "wer": score.wer,
        "secondary": finite(score.loss),
        "complete": score.complete,
    }
