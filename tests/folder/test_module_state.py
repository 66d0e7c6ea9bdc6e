"""What modules keep outside of their state dict."""

import pytest
import torch
from speechbrain.lobes.models.transformer.Transformer import PositionalEncoding
from speechbrain.processing.features import InputNormalization
from torch import nn

from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.folder.module_state import (
    COMPUTED,
    PREFIX,
    computed_buffers,
    hidden_state,
    set_hidden_state,
    take_computed,
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
    assert all(name.startswith(PREFIX) for name in state)
    twin = nn.Sequential(InputNormalization(), nn.Linear(5, 5))
    set_hidden_state({"a": twin}, state, "here")
    assert twin[0].count == module[0].count > 0
    x = torch.randn(1, 3, 5)
    assert torch.equal(twin[0].eval()(x), module[0](x))


def test_statistics_of_another_model():
    state = hidden_state({"a": normalization(1)})
    with pytest.raises(CheckpointError, match="no statistics of 'b'"):
        set_hidden_state({"b": InputNormalization()}, state, "here")
    with pytest.raises(CheckpointError, match="that the model does not take"):
        set_hidden_state({"a": nn.Linear(2, 2)}, state, "here")


def test_tables_of_positions_are_computed():
    def made():
        return {"a": nn.Sequential(PositionalEncoding(8, 200), nn.Linear(8, 8))}

    modules, name = made(), "a.0.pe"
    table = modules["a"][0].pe
    for dtype, expected in (
        ("float16", table.half().float()),
        ("float32", table),
    ):
        found = computed_buffers(modules, made(), dtype)
        assert list(found) == [name]
        floats = {COMPUTED + name: found[name], "a.1.bias": torch.ones(8)}
        taken = take_computed(made(), floats)
        assert list(floats) == ["a.1.bias"]
        assert torch.equal(taken[name], expected)
    table[0, 3, 0] += 1
    assert not computed_buffers(modules, made(), "float16")
    with pytest.raises(ValueError, match=r"no buffer 'a\.1\.pe'"):
        take_computed(made(), {f"{COMPUTED}a.1.pe": found[name]})
