"""Tests of speechbrain_stablequant.brain.recognizer."""

import pytest

from speechbrain_stablequant.brain import recognizer
from speechbrain_stablequant.methods.search.score import Score

#: Place, errors, words and loss of batches of two utterances.
ROWS = [(i, [1, 2], [i, 3], float(i)) for i in range(5)]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("limit", [2, 3, 8, 14, 15])
def test_a_score_is_that_of_one_process(monkeypatch, processes, limit):
    """Several processes have measured more when they notice the limit."""
    count = min(limit // 3 + 1, 5)
    alone = recognizer._score(ROWS[:count], 5, limit)
    assert alone.errors == 3 * count
    assert alone.complete == (count == 5)
    parts = [ROWS[rank::processes] for rank in range(processes)]
    monkeypatch.setattr(recognizer, "gathered", lambda mine: parts)
    assert recognizer._score(parts[0], 5, limit) == alone


def test_errors_before_the_first_word():
    """Inserted words may exceed the limit; a set needs words as a whole."""
    row = (0, [2], [0], 1.0)
    assert recognizer._score([row], 3, 1) == Score(2, 1, 1.0, complete=False)
    with pytest.raises(ValueError, match="the transcripts hold no word"):
        recognizer._score([row], 1, 1)
