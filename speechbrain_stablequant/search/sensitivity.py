"""Step 1, layer selection: which units suffer when quantized alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..plan import LayerQuant
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
        Whether the rise is above the threshold.
    """

    unit: str
    score: Score
    delta_wer: float
    selected: bool


def select_units(
    units: Mapping[str, Mapping[str, LayerQuant]],
    evaluate: Evaluate,
    threshold: float,
) -> tuple[Score, list[Sensitivity]]:
    """Measures every unit alone and selects those that suffer.

    Arguments
    ---------
    units : Mapping
        For each unit, in network order, its layers quantized by MAX
        calibration.
    evaluate : Evaluate
        Measures on the search set.
    threshold : float
        Points of WER (absolute) above which a unit is selected.

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
    found = []
    for unit, quants in units.items():
        score = evaluate(quants, start=unit, label=f"{unit} alone")
        delta = score.wer - baseline.wer
        # In whole words: the rates' rounding must not decide.
        more = 100 * (score.errors - baseline.errors)
        selected = more > threshold * baseline.words
        found.append(Sensitivity(unit, score, delta, selected))
    return baseline, found
