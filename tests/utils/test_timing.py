"""Tests of speechbrain_stablequant.utils.timing."""

import time

import pytest

from speechbrain_stablequant.utils.timing import PREPARATION, BatchTimes


def test_preparation_is_not_counted():
    times = BatchTimes()
    with times.batch(), PREPARATION.running():
        time.sleep(0.05)
    assert 0 <= times.seconds[0] < 0.05


def test_a_failed_batch_is_not_recorded():
    times = BatchTimes()
    with pytest.raises(RuntimeError), times.batch():
        raise RuntimeError
    assert times.seconds == []


def test_the_first_of_several_is_dropped():
    assert BatchTimes.counted([3.0]) == [3.0]
    assert BatchTimes.counted([3.0, 1.0, 2.0]) == [1.0, 2.0]
