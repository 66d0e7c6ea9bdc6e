"""Step 2, outlier removal: the clipping percentile of each selected unit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...core.plan import LayerQuant
from .paired import PUBLISHED, Selection, better
from .score import Evaluate, Score


@dataclass(frozen=True)
class UnitCutoff:
    """The clipping percentile of a unit, and all that were tried."""

    unit: str
    cutoff: float
    curve: list[tuple[float, Score]]


def best_cutoff(curve: Sequence[tuple[float, Score]]) -> float:
    """The percentile with the fewest word errors.

    Ties go to the smaller loss, then to the larger percentile. Evaluations that
    gave up never win.
    """
    ratio, _ = min(
        (row for row in curve if row[1].complete),
        key=lambda row: (row[1].errors, row[1].loss, -row[0]),
    )
    return ratio


def surest_cutoff(curve: Sequence[tuple[float, Score]], level: float) -> float:
    """The percentile that no smaller one beats beyond noise.

    From the largest down, each replaces the best so far only if it is better in
    a paired comparison.
    """
    (best, fewest), *rest = sorted(curve, key=lambda row: -row[0])
    for ratio, score in rest:
        if better(score, fewest, level):
            best, fewest = ratio, score
    return best


def search_cutoffs(
    selected: Sequence[str],
    grid: Sequence[float],
    quantize_unit: Callable[[str, float], Mapping[str, LayerQuant]],
    evaluate: Evaluate,
    selection: Selection = PUBLISHED,
) -> list[UnitCutoff]:
    """Searches the clipping percentile of each selected unit.

    In network order, with earlier decisions in place and later units float.

    Arguments
    ---------
    selected : sequence of str
        Names of the selected units, in network order.
    grid : sequence of float
        Percentiles to try.
    quantize_unit : callable
        Layers of a unit, clipped at a percentile of |input|.
    evaluate : Evaluate
        Measures on the search set.
    selection : Selection
        ``threshold``: the fewest word errors win (:func:`best_cutoff`).
        ``interval``: better beyond noise wins (:func:`surest_cutoff`); no
        evaluation gives up then.

    Returns
    -------
    list of UnitCutoff

    Example
    -------
    >>> def quantize(unit, ratio):
    ...     return {unit: LayerQuant(8, 8, ratio)}
    >>> def measure(quants, start=None, give_up_above=None, label=""):
    ...     amax = quants[start].activation_amax
    ...     return Score(errors=int(abs(amax - 99.9) * 99), words=9, loss=0)
    >>> [c.cutoff for c in search_cutoffs(["u"], [100, 99.9, 99], quantize,
    ...     measure)]
    [99.9]
    """
    decided: dict[str, LayerQuant] = {}
    found = []
    by_interval = selection.rule == "interval"
    for unit in selected:
        curve: list[tuple[float, Score]] = []
        fewest: int | None = None
        for ratio in sorted(grid, reverse=True):
            score = evaluate(
                {**decided, **quantize_unit(unit, ratio)},
                start=unit,
                give_up_above=fewest,
                label=f"{unit} cut at {ratio:g} %",
            )
            curve.append((ratio, score))
            if by_interval or not score.complete:
                continue
            if fewest is None or score.errors < fewest:
                fewest = score.errors
        ratio = (
            surest_cutoff(curve, selection.level)
            if by_interval
            else best_cutoff(curve)
        )
        decided.update(quantize_unit(unit, ratio))
        found.append(UnitCutoff(unit, ratio, curve))
    return found
