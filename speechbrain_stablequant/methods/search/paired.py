"""Paired comparison of two scores of the same utterances.

Hard utterances are hard for both models, so the uncertainty of a difference
is far smaller than that of either WER. The loss reacts to changes too small
for words: it decides where the WER is inconclusive.
"""

import math
from dataclasses import dataclass

import numpy as np

from ...config import RULES
from ...core.error_rates import DeltaInterval, paired_interval
from .score import Score

# Enough for the levels in use, and below 10 ms: the search compares often.
RESAMPLES = 2000


@dataclass(frozen=True)
class Selection:
    """Decision rule of the search and the coverage of its intervals.

    ``"threshold"`` compares plain figures, as published; ``"interval"``
    compares paired confidence intervals.
    """

    rule: str = "threshold"
    level: float = 0.8

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"'{self.rule}' is not one of {', '.join(RULES)}")


# The rule of the paper.
PUBLISHED = Selection()


def wer_rise(before: Score, after: Score, level: float) -> DeltaInterval | None:
    """Rise of the WER in points; None without counts by utterance."""
    one, two = before.utterance_errors, after.utterance_errors
    if not one or len(one) != len(two):
        return None
    extra = np.asarray(two) - np.asarray(one)
    words = np.asarray(before.utterance_words)
    return paired_interval(extra, words, RESAMPLES, level)


def loss_rise(
    before: Score, after: Score, level: float
) -> DeltaInterval | None:
    """Rise of the loss; None without a finite loss for each batch."""
    one, two = before.batch_losses, after.batch_losses
    if not one or len(one) != len(two):
        return None
    extra = np.asarray(two) - np.asarray(one)
    found = paired_interval(extra, np.ones(len(one)), RESAMPLES, level)
    return DeltaInterval(*(end / 100 for end in found))


def points_per_loss(score: Score) -> float:
    """Points of WER for one unit of loss, if both rise in proportion."""
    if not 0 < score.loss < math.inf:
        return 0.0
    return score.wer / score.loss


def better(one: Score, two: Score, level: float) -> bool:
    """Whether a score is better than another beyond noise.

    By the WER if its interval excludes zero, else by the loss.
    """
    for rise in (wer_rise, loss_rise):
        found = rise(two, one, level)
        if found is not None and (found.high < 0 or found.low > 0):
            return found.high < 0
    return False
