"""Tests of speechbrain_stablequant.utils.yaml_tree."""

import pytest

from speechbrain_stablequant.utils.yaml_tree import Tagged, parse_yaml


def test_tags_are_data():
    found = parse_yaml("head: !apply:os.remove [plan.json]\nsize: 2")
    assert found == {
        "head": Tagged("apply:os.remove", ["plan.json"]),
        "size": 2,
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "it is not YAML"),
        ("a: 1\na: 2", "is there twice"),
        ("[" * 100, "nested too deeply"),
    ],
)
def test_other_text(text, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)
