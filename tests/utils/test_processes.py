"""What a process does alone, and when several ask each other."""

import pytest

from speechbrain_stablequant.brain import recognizer as brain
from speechbrain_stablequant.utils import distributed


def test_one_process_has_everything():
    assert (distributed.size(), distributed.rank()) == (1, 0)
    assert distributed.is_main()
    assert list(distributed.share(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rounds", [1, 7, 8, 9, 16, 17])
def test_all_ask_equally_often(rounds, monkeypatch):
    """Also those that have no batch in the last round."""
    asked = []
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(
        brain, "gathered", lambda errors: asked.append(errors) or [errors, 100]
    )
    counts = []
    for batches in (rounds, rounds - 1):
        asked.clear()
        known = [brain._in_all(5, i + 1, rounds) for i in range(batches)]
        assert set(known) <= {0, 105}
        assert known.count(105) == len(asked)
        counts.append(len(asked))
    assert counts[0] == counts[1] == (rounds - 1) // brain._TOGETHER
