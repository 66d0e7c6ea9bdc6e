"""What counts as time of computing."""

import random
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from speechbrain_stablequant.brain.passes import (
    MOST_TURNS,
    FloatTurns,
    ForwardClock,
)
from speechbrain_stablequant.report.results import Turns
from speechbrain_stablequant.utils.timing import PREPARATION


class FakeTime:
    """A clock that only moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def fake_time(monkeypatch):
    return FakeTime(monkeypatch)


def batch(preparing, computing):
    """1 s of audio in two utterances, with seconds of work."""
    sig = (torch.zeros(2, 16000), torch.tensor([0.75, 0.25]))
    return SimpleNamespace(sig=sig, work=(preparing, computing))


@pytest.fixture
def brain(fake_time):
    """Recognizes by preparing and by computing; in float ten times as long."""

    def compute_forward(batch):
        preparing, computing = batch.work
        if preparing:
            with PREPARATION.running():
                fake_time.sleep(preparing)
        fake_time.sleep(10 * computing if brain.in_float else computing)
        brain.passes.append(brain.in_float)
        brain.random.append(random.random())
        batch.work = None  # Recipes may change their batch.
        return brain.in_float

    brain = SimpleNamespace(device="cpu", compute_forward=compute_forward)
    brain.in_float, brain.passes, brain.random = False, [], []
    return brain


def test_preparing_is_not_computing(brain):
    before, inner = PREPARATION.seconds, brain.compute_forward
    clock = ForwardClock(brain, "sig", 16000)
    with clock.running():
        for work in [(9, 1), (0, 3), (5, 2)]:
            brain.compute_forward(batch(*work))
    assert brain.compute_forward is inner
    assert clock.seconds == pytest.approx([1, 3, 2])
    assert clock.audio == [1, 1, 1]
    assert PREPARATION.seconds - before == pytest.approx(14)


def take_turns(brain, seconds):
    """The turns of batches, and what a listener between has heard."""

    @contextmanager
    def in_float():
        brain.in_float = True
        yield
        brain.in_float = False

    clock = ForwardClock(brain, "sig", 16000)
    turns, heard = FloatTurns(clock, len(seconds), in_float), []
    with clock.running():
        timed = brain.compute_forward
        brain.compute_forward = lambda batch: heard.append(timed(batch))
        with turns.running():
            for each in seconds:
                brain.compute_forward(batch(0, each))
        brain.compute_forward = timed
    return turns.times, heard


def test_the_float_model_goes_first_in_each_turn(brain):
    times, heard = take_turns(brain, [5, 1, 2])
    assert brain.passes == [True, False] * 3
    # The first turn allocates memory.
    assert times == Turns(
        pytest.approx([10, 20]), pytest.approx([1, 2]), [1, 1]
    )
    # What listens to the quantized model does not hear the float one.
    assert heard == [False] * 3


def test_turns_are_few_and_spread_over_the_set(brain):
    times, heard = take_turns(brain, list(range(1, 26)))
    assert len(heard) == 25
    turns = [i for i, in_float in enumerate(brain.passes) if in_float]
    assert len(turns) == 9 <= MOST_TURNS
    assert times.quantized == pytest.approx([4, 7, 10, 13, 16, 19, 22, 25])
    assert times.float == pytest.approx([10 * x for x in times.quantized])


def test_a_turn_does_not_move_random_numbers(brain):
    random.seed(0)
    take_turns(brain, [1, 1, 1])
    drawn = brain.random[1::2]
    random.seed(0)
    assert drawn == [random.random() for _ in range(3)]


@pytest.mark.parametrize("seconds", [[], [4]])
def test_turns_of_few_batches(brain, seconds):
    times, _ = take_turns(brain, seconds)
    assert times.quantized == pytest.approx(seconds)
