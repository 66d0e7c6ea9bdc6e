"""Tests of speechbrain_stablequant.utils.patching."""

import pytest
import torch
from torch import nn

from speechbrain_stablequant.utils.patching import (
    on_meta,
    own_forwards,
    restored,
    shadowed,
    shadowed_forwards,
)


class Thing:
    size = 1


def test_a_class_attribute_is_visible_again():
    thing = Thing()
    with pytest.raises(RuntimeError), shadowed(thing, "size", 2):
        assert thing.size == 2
        raise RuntimeError
    assert thing.size == 1 and vars(thing) == {}


def test_an_instance_attribute_is_restored():
    thing = Thing()
    thing.size = 3
    with shadowed(thing, "size", 2):
        assert thing.size == 2
    assert vars(thing) == {"size": 3}


def test_all_attributes_are_restored():
    thing = Thing()
    thing.size, thing.name = 3, "a"
    with pytest.raises(RuntimeError), restored(thing):
        thing.size, thing.more = 2, 1
        del thing.name
        raise RuntimeError
    assert vars(thing) == {"size": 3, "name": "a"}


def test_modules_compute_by_themselves_for_a_while():
    module, x = nn.ReLU(), torch.tensor([-1.0])
    with shadowed_forwards({module: lambda x: x - 1}):
        assert module(x) == -2
        with pytest.raises(RuntimeError), own_forwards([module]):
            assert module(x) == 0
            raise RuntimeError
        assert module(x) == -2
    assert module(x) == 0


def test_modules_without_storage():
    before = torch.get_rng_state()
    with on_meta():
        made = [nn.Linear(2, 3), nn.Conv1d(2, 3, 4), nn.GRU(2, 3)]
        nn.init.xavier_normal_(made[0].weight)
    assert all(p.is_meta for module in made for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert not nn.Linear(2, 3).weight.is_meta
