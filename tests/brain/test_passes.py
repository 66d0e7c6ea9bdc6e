"""What counts as time of computing."""

import time
from types import SimpleNamespace

import pytest
import torch

from speechbrain_stablequant.brain.passes import ForwardClock
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


def run(steps, fake_time):
    """A clock after batches of 1 s of audio, each with seconds of preparing
    and of computing."""

    def compute_forward(batch):
        preparing, computing = batch.work
        if preparing:
            with PREPARATION.running():
                fake_time.sleep(preparing)
        fake_time.sleep(computing)

    brain = SimpleNamespace(device="cpu", compute_forward=compute_forward)
    clock = ForwardClock(brain, "sig", 16000)
    with clock.running():
        for work in steps:
            sig = (torch.zeros(2, 16000), torch.tensor([0.75, 0.25]))
            brain.compute_forward(SimpleNamespace(sig=sig, work=work))
    assert brain.compute_forward is compute_forward
    return clock


def test_the_first_batch_is_not_counted(fake_time):
    clock = run([(0, 50), (0, 1), (0, 2)], fake_time)
    assert clock.seconds == pytest.approx(3)
    assert clock.audio_seconds == pytest.approx(2)


def test_a_single_batch_is(fake_time):
    clock = run([(0, 50)], fake_time)
    assert clock.seconds == pytest.approx(50)
    assert clock.audio_seconds == pytest.approx(1)


def test_preparing_is_not_computing(fake_time):
    before = PREPARATION.seconds
    clock = run([(9, 1), (30, 1), (0, 1), (5, 2)], fake_time)
    assert clock.seconds == pytest.approx(4)
    assert PREPARATION.seconds - before == pytest.approx(44)
