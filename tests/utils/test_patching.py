"""Tests of speechbrain_stablequant.utils.patching."""

import pytest

from speechbrain_stablequant.utils.patching import shadowed


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
