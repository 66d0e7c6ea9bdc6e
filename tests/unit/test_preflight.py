"""What is said about the runtime that a variant gets."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from speechbrain_stablequant import QuantizeConfig, runtime
from speechbrain_stablequant.config import ConfigError
from speechbrain_stablequant.preflight import choose_runtime

FAILURE = "operator linear fails: no (tried on a card); use backend: torch"


def choose(device: str, **block):
    """The runtime of a Brain on a device, and what is to be said."""
    modules = nn.ModuleDict({"enc": nn.Linear(2, 2)})
    brain = SimpleNamespace(device=device, modules=modules)
    config = QuantizeConfig.from_dict({"target": ["enc"], **block})
    return choose_runtime(brain, config)


@pytest.fixture
def failing_card(monkeypatch):
    """A GPU whose kernels failed their trial."""
    monkeypatch.setattr(runtime, "_why_not", lambda *_: FAILURE)


def test_a_card_that_fails_is_in_the_report(failing_card):
    said = "operator linear fails: no (tried on a card)."
    assert choose("cuda:0") == (
        "torch",
        [f"Evaluated by simulation: triton: {said}"],
    )


def test_a_card_that_fails_is_an_error_where_it_was_asked_for(failing_card):
    with pytest.raises(ConfigError, match=r"quantize\.backend: triton cannot"):
        choose("cuda:0", backend="triton")


def test_a_device_without_an_integer_runtime():
    name, warnings = choose(str(torch.device("meta")))
    assert name == "torch"
    assert warnings == [
        "Evaluated by simulation: no integer runtime for device meta."
    ]


def test_a_simulation_that_was_asked_for_needs_no_word():
    assert choose("cpu", backend="torch") == ("torch", [])
