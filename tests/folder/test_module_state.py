"""What modules keep outside of their state dict."""

import pytest
import torch
from speechbrain.processing.features import InputNormalization
from torch import nn

from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.folder.module_state import (
    hidden_state,
    set_hidden_state,
    split_state,
)


def normalization(seed):
    """A module that has seen features."""
    torch.manual_seed(seed)
    module = InputNormalization().train()
    module(torch.randn(2, 30, 5), torch.ones(2))
    return module.eval()


def test_statistics_are_the_same_bits():
    module = nn.Sequential(normalization(1), nn.Linear(5, 5))
    state = hidden_state({"a": module})
    assert not any(x.is_floating_point() for x in state.values())
    others, found = split_state({**state, "a.1.weight": torch.ones(5, 5)})
    assert list(others) == ["a.1.weight"]
    twin = nn.Sequential(InputNormalization(), nn.Linear(5, 5))
    set_hidden_state({"a": twin}, found, "here")
    assert twin[0].count == module[0].count > 0
    x = torch.randn(1, 3, 5)
    assert torch.equal(twin[0].eval()(x), module[0](x))


def test_statistics_of_another_model():
    state = hidden_state({"a": normalization(1)})
    with pytest.raises(CheckpointError, match="no statistics of 'b'"):
        set_hidden_state({"b": InputNormalization()}, state, "here")
    with pytest.raises(CheckpointError, match="that the model does not take"):
        set_hidden_state({"a": nn.Linear(2, 2)}, state, "here")
