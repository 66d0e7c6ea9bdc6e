"""Two scores of the same utterances, compared in pairs.

An utterance that is hard for one model is hard for the other, so the
uncertainty of a difference is far smaller than that of either rate. The loss
moves with every change where few words do, so its interval is the narrower
one: it decides what the words leave open.
"""

import math
from dataclasses import dataclass

import numpy as np

from ...config import RULES
from ...core.error_rates import DeltaInterval, paired_interval
from .score import Score

# The search compares many pairs: enough for its levels, below 10 ms.
RESAMPLES = 2000


@dataclass(frozen=True)
class Selection:
    """How a search decides.

    Arguments
    ---------
    rule : str
        ``"threshold"``: by the figures as they are, which is StableQuant as
        published. ``"interval"``: by paired intervals.
    level : float
        Coverage of the intervals, between 0 and 1.

    Raises
    ------
    ValueError
        Another rule.
    """

    rule: str = "threshold"
    level: float = 0.8

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"'{self.rule}' is not one of {', '.join(RULES)}")


# The rule of the paper.
PUBLISHED = Selection()


def wer_rise(before: Score, after: Score, level: float) -> DeltaInterval | None:
    """Rise of the WER with its interval.

    Arguments
    ---------
    before, after : Score
        Of the same set.
    level : float
        Coverage, between 0 and 1.

    Returns
    -------
    DeltaInterval or None
        In points; None where one of them has no counts by utterance.

    Example
    -------
    >>> one = Score(1, 8, 0.5, utterance_errors=(1, 0), utterance_words=(4, 4))
    >>> two = Score(3, 8, 0.9, utterance_errors=(2, 1), utterance_words=(4, 4))
    >>> tuple(wer_rise(one, two, 0.8))
    (25.0, 25.0, 25.0)
    """
    one, two = before.utterance_errors, after.utterance_errors
    if not one or len(one) != len(two):
        return None
    extra = np.asarray(two) - np.asarray(one)
    words = np.asarray(before.utterance_words)
    return paired_interval(extra, words, RESAMPLES, level)


def loss_rise(
    before: Score, after: Score, level: float
) -> DeltaInterval | None:
    """Rise of the secondary metric with its interval.

    Arguments
    ---------
    before, after : Score
        Of the same set.
    level : float
        Coverage, between 0 and 1.

    Returns
    -------
    DeltaInterval or None
        None where one of them has no finite loss for each batch.

    Example
    -------
    >>> one = Score(1, 8, 0.5, batch_losses=(0.5, 0.5))
    >>> two = Score(1, 8, 1.0, batch_losses=(1.0, 1.0))
    >>> tuple(loss_rise(one, two, 0.8))
    (0.5, 0.5, 0.5)
    """
    one, two = before.batch_losses, after.batch_losses
    if not one or len(one) != len(two):
        return None
    extra = np.asarray(two) - np.asarray(one)
    found = paired_interval(extra, np.ones(len(one)), RESAMPLES, level)
    return DeltaInterval(*(end / 100 for end in found))


def points_per_loss(score: Score) -> float:
    """What a rise of the loss is worth in points of WER.

    Arguments
    ---------
    score : Score
        Of the float model.

    Returns
    -------
    float
        As if the WER rose in proportion to the loss; 0 where it has none.

    Example
    -------
    >>> points_per_loss(Score(errors=1, words=10, loss=0.5))
    20.0
    """
    if not 0 < score.loss < math.inf:
        return 0.0
    return score.wer / score.loss


def better(one: Score, two: Score, level: float) -> bool:
    """Whether the first score is better than the second one beyond noise.

    Arguments
    ---------
    one, two : Score
        Of the same set.
    level : float
        Coverage, between 0 and 1.

    Returns
    -------
    bool
        By the WER if its interval excludes zero, else by that of the loss.

    Example
    -------
    >>> one = Score(9, 8, 0.5, batch_losses=(0.5, 0.5))
    >>> two = Score(9, 8, 1.0, batch_losses=(1.0, 1.0))
    >>> better(one, two, 0.8), better(two, one, 0.8), better(one, one, 0.8)
    (True, False, False)
    """
    for rise in (wer_rise, loss_rise):
        found = rise(two, one, level)
        if found is not None and (found.high < 0 or found.low > 0):
            return found.high < 0
    return False
