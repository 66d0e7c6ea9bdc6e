"""Step 2, outlier removal: where to cut each selected unit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...core.plan import LayerQuant
from .paired import PUBLISHED, Selection, better
from .score import Evaluate, Score


@dataclass(frozen=True)
class UnitCutoff:
    """The cut-off of one unit, and how it was found.

    Arguments
    ---------
    unit : str
        Name of the unit.
    cutoff : float
        The chosen ratio in percent.
    curve : list of (float, Score)
        Every ratio that was tried.
    """

    unit: str
    cutoff: float
    curve: list[tuple[float, Score]]


def best_cutoff(curve: Sequence[tuple[float, Score]]) -> float:
    """The ratio with the fewest word errors; ties go to the smaller loss,
    then to the larger ratio.

    Arguments
    ---------
    curve : sequence of (float, Score)
        Ratios in percent and what they gave; given-up ones never win.

    Returns
    -------
    float
        The chosen ratio in percent.

    Example
    -------
    >>> best_cutoff([(100, Score(9, 50, 1.0)), (99.9, Score(7, 50, 1.2)),
    ...     (99, Score(7, 50, 1.1))])
    99
    """
    ratio, _ = min(
        (row for row in curve if row[1].complete),
        key=lambda row: (row[1].errors, row[1].loss, -row[0]),
    )
    return ratio


def surest_cutoff(curve: Sequence[tuple[float, Score]], level: float) -> float:
    """The ratio that no smaller one beats beyond noise.

    From the largest ratio down, each takes the place of the best so far only
    if it is better in pairs: fewer word errors, or the same within their
    interval and a smaller loss.

    Arguments
    ---------
    curve : sequence of (float, Score)
        Ratios in percent and what they gave.
    level : float
        Coverage of the intervals, between 0 and 1.

    Returns
    -------
    float
        The chosen ratio in percent.

    Example
    -------
    >>> def score(loss):
    ...     return Score(9, 50, loss, batch_losses=(loss, loss))
    >>> surest_cutoff([(100, score(1.0)), (99.9, score(0.9)),
    ...     (99, score(0.9))], level=0.8)
    99.9
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
    """Searches the cut-off of each selected unit, in network order, with the
    earlier decisions in place and the later units float.

    Arguments
    ---------
    selected : sequence of str
        Names of the selected units, in network order.
    grid : sequence of float
        Ratios in percent to try.
    quantize_unit : callable
        Of a unit and a ratio: its layers, amax at that quantile of |input|.
    evaluate : Evaluate
        Measures on the search set.
    selection : Selection
        By the rule ``threshold`` the fewest word errors win
        (:func:`best_cutoff`), by ``interval`` what is better beyond noise
        (:func:`surest_cutoff`), for which none can be given up.

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
