"""Paired comparison of two scores of the same utterances.

Hard utterances are hard for both models, so the uncertainty of a difference
is far smaller than that of either WER. The loss reacts to changes too small
for words: it decides where the WER is inconclusive.
"""

from collections.abc import Sequence

import numpy as np

from ...core.error_rates import DeltaInterval, paired_interval
from .score import Score

# Enough for the levels in use, and below 10 ms: the search compares often.
RESAMPLES = 2000


def wer_rise(before: Score, after: Score, level: float) -> DeltaInterval | None:
    """Rise of the WER in points; None without counts by utterance."""
    return _rise(
        before.utterance_errors,
        after.utterance_errors,
        before.utterance_words,
        level,
    )


def loss_rise(
    before: Score, after: Score, level: float
) -> DeltaInterval | None:
    """Rise of the loss; None without a finite loss for each batch."""
    losses = before.batch_losses
    found = _rise(losses, after.batch_losses, np.ones(len(losses)), level)
    return found and DeltaInterval(*(end / 100 for end in found))


def _rise(
    before: Sequence[float],
    after: Sequence[float],
    lengths: Sequence[float],
    level: float,
) -> DeltaInterval | None:
    if not before or len(before) != len(after):
        return None
    extra = np.asarray(after) - np.asarray(before)
    return paired_interval(extra, np.asarray(lengths), RESAMPLES, level)


def better(one: Score, two: Score, level: float) -> bool:
    """Whether a score is better than another beyond noise.

    By the WER if its interval excludes zero, else by the loss.
    """
    for rise in (wer_rise, loss_rise):
        found = rise(two, one, level)
        if found is not None and (found.high < 0 or found.low > 0):
            return found.high < 0
    return False
