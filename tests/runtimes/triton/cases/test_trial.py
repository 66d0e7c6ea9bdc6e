"""The trial of a card: passes, and says which operator does not."""

import pytest
import torch

from speechbrain_stablequant.runtimes.triton.kernels import trial
from speechbrain_stablequant.runtimes.triton.kernels.library import OPERATORS
from speechbrain_stablequant.runtimes.triton.kernels.tuning import Tuner
from speechbrain_stablequant.utils.store import Store


def test_covers_every_operator():
    assert {name for name, *_ in trial.trials()} == set(OPERATORS)


def test_all_operators_pass(device):
    """Also where a tile is used only if its result is the reference's."""
    once = {"measure": lambda run: run() or 1.0, "tune": False}
    tuner = Tuner(Store(None), "tiles", "a card", **once)
    with tuner.active():
        assert trial.first_failure(torch.device(device)) is None
    tried = {key.partition("/")[0] for key in tuner.table}
    assert tried == set(OPERATORS) - {
        "quantize",
        "wave_gram",
        "layer_norm_both",
    }


@pytest.mark.parametrize("operator", ["linear", "wave_gram"])
def test_another_result_is_named(operator, device, monkeypatch):
    right = getattr(torch.ops.stablequant, operator)

    class Wrong:
        def __getattr__(self, name):
            found = getattr(torch.ops.stablequant, name)
            return found if name != operator else lambda *a: right(*a) // 2

    only = [t for t in trial.trials() if t[0] == operator]
    monkeypatch.setattr(trial, "trials", lambda: only)
    monkeypatch.setattr(trial, "OPS", Wrong())
    reason = trial.first_failure(torch.device(device))
    assert reason.startswith(f"operator {operator}: the result ")


def test_an_error_is_named(device, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such instruction\nline 2")

    class Broken:
        quantize = staticmethod(broken)

    monkeypatch.setattr(trial, "OPS", Broken())
    reason = trial.first_failure(torch.device(device))
    assert reason == "operator quantize fails: no such instruction"
