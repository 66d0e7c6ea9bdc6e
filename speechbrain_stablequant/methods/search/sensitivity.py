"""Step 1, layer selection: units that are sensitive when quantized alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...core.error_rates import DeltaInterval
from ...core.plan import LayerQuant
from .paired import PUBLISHED, Selection, loss_rise, points_per_loss, wer_rise
from .score import Evaluate, Score


@dataclass(frozen=True)
class Sensitivity:
    """The effect of quantizing one unit alone.

    ``delta_wer``: rise over the float model in points, with its ``interval`` if
    there are counts by utterance; ``selected``: whether the unit is sensitive.
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
    """Measures every unit alone and selects the sensitive ones.

    Rule ``threshold``: a unit is selected if its rise is above the threshold.
    Rule ``interval``: if the whole interval of the rise is above. If the
    interval contains the threshold, the loss decides: its rise, converted to
    points of WER, must be above the threshold and its interval above zero.

    Arguments
    ---------
    units : Mapping
        For each unit, in network order, its layers without clipping.
    evaluate : Evaluate
        Measures on the search set.
    threshold : float
        Rise of the WER in points.
    selection : Selection
        The rule.

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
        # In whole words, so that rounding of rates does not decide.
        more = 100 * (score.errors - baseline.errors)
        selected = more > threshold * baseline.words
        if selection.rule == "interval":
            if interval is None:
                raise ValueError(
                    "quantize.search.selection: interval needs errors by "
                    "utterance, which the recipe's metric does not count; "
                    "use selection: threshold"
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
