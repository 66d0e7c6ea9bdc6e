"""Step 1, layer selection: which units suffer when quantized alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...core.error_rates import DeltaInterval
from ...core.plan import LayerQuant
from .paired import PUBLISHED, Selection, loss_rise, points_per_loss, wer_rise
from .score import Evaluate, Score


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one unit alone does.

    Arguments
    ---------
    unit : str
        Name of the unit.
    score : Score
        With this unit quantized and everything else float.
    delta_wer : float
        Rise of the WER over the float model, in points.
    selected : bool
        Whether it counts as above the threshold.
    interval : DeltaInterval or None
        Of the rise; None where the counts by utterance are not known.
    """

    unit: str
    score: Score
    delta_wer: float
    selected: bool
    interval: DeltaInterval | None = None


def select_units(
    units: Mapping[str, Mapping[str, LayerQuant]],
    evaluate: Evaluate,
    threshold: float,
    selection: Selection = PUBLISHED,
) -> tuple[Score, list[Sensitivity]]:
    """Measures every unit alone and selects those that suffer.

    By the rule ``threshold`` a unit is selected when its rise is above the
    threshold. By the rule ``interval`` it is when the whole interval of the
    rise is, and it is not when the whole interval is below. Where the
    threshold lies within the interval, the loss decides: its rise, taken as
    the same relative rise of the WER, must be above the threshold and its
    interval above zero.

    Arguments
    ---------
    units : Mapping
        For each unit, in network order, its layers quantized by MAX
        calibration.
    evaluate : Evaluate
        Measures on the search set.
    threshold : float
        Points of WER (absolute) above which a unit is selected.
    selection : Selection
        How that is decided.

    Returns
    -------
    Score
        Of the float model.
    list of Sensitivity
        In network order.

    Example
    -------
    >>> def measure(quants, start=None, give_up_above=None, label=""):
    ...     return Score(errors=5 + 3 * ("a" in quants), words=100, loss=1.0)
    >>> quant = LayerQuant(8, 8, 1.0)
    >>> _, found = select_units({"u": {"a": quant}, "v": {"b": quant}},
    ...     measure, threshold=0.25)
    >>> [(s.unit, s.delta_wer, s.selected) for s in found]
    [('u', 3.0, True), ('v', 0.0, False)]
    """
    baseline = evaluate({}, label="float")
    worth = points_per_loss(baseline)
    found = []
    for unit, quants in units.items():
        score = evaluate(quants, start=unit, label=f"{unit} alone")
        interval = wer_rise(baseline, score, selection.level)
        # In whole words: the rates' rounding must not decide.
        more = 100 * (score.errors - baseline.errors)
        selected = more > threshold * baseline.words
        if selection.rule == "interval":
            if interval is None:
                raise ValueError(
                    "search: the recognizer counts no errors by utterance, "
                    "which selection: interval needs; write selection: "
                    "threshold"
                )
            if interval.low <= threshold < interval.high:
                loss = loss_rise(baseline, score, selection.level)
                selected = (
                    loss is not None
                    and loss.low > 0
                    and worth * loss.delta > threshold
                )
        delta = score.wer - baseline.wer
        found.append(Sensitivity(unit, score, delta, selected, interval))
    return baseline, found
