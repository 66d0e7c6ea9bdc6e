"""Values of files against the types that are meant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from speechbrain_stablequant.utils.typed import one_line, short, typed


@dataclass(frozen=True)
class Inner:
    """A part."""

    kind: Literal["one", 2]
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outer:
    """A whole."""

    count: int
    parts: list[Inner] = field(default_factory=list)
    best: Inner | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    note: str | int = ""


def test_a_whole_file():
    raw = {
        "count": 2,
        "parts": [{"kind": "one", "values": [1, 2.5]}, {"kind": 2}],
        "best": None,
        "rows": {"a": 1},
        "note": 7,
    }
    parts = [Inner("one", (1.0, 2.5)), Inner(2)]
    assert typed(raw, Outer, "file") == Outer(2, parts, None, {"a": 1}, 7)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": True}, "file.count: must be int, not True"),
        ({"count": 1.0}, "file.count: must be int, not 1.0"),
        ({"count": 2**63}, "file.count: must be int, not <an integer of 64"),
        ({"parts": {}}, "file.parts: must be a list of Inner, not {}"),
        (
            {"parts": [[]]},
            r"file.parts\[0\]: must be a block of keys",
        ),
        ({"parts": [{}]}, r"file.parts\[0\]: lacks 'kind'"),
        ({"parts": [{"kind": []}]}, r"kind: must be one of one, 2, not \[\]"),
        ({"parts": [{"kind": 2.0}]}, "kind: must be one of one, 2, not 2.0"),
        (
            {"best": {"kind": 2, "values": [float("nan")]}},
            r"file.best.values\[0\]: must be float, not nan",
        ),
        ({"best": {"kind": 2, "values": ["1"]}}, "must be float, not '1'"),
        ({"rows": {"a\nb": ""}}, "file.rows.a b: must be int, not ''"),
        ({"note": None}, "file.note: must be int, not None"),
        ({"more": 1}, "file.more: unknown key"),
    ],
)
def test_the_first_wrong_place_is_named(change, message):
    with pytest.raises(ValueError, match=f"^{message}|{message}") as caught:
        typed({"count": 1, **change}, Outer, "file")
    assert type(caught.value) is ValueError
    assert len(str(caught.value).splitlines()) == 1


def test_a_key_that_is_missing():
    with pytest.raises(ValueError, match=r"^file: lacks 'count'$"):
        typed({}, Outer, "file")


def test_plain_kinds():
    assert typed(3, float, "x") == 3.0
    assert type(typed(3, float, "x")) is float
    assert typed([1], Sequence[int], "x") == [1]
    assert typed({1: 2}, Any, "x") == {1: 2}
    with pytest.raises(ValueError, match="x: must be float, not <an integer"):
        typed(10**400, float, "x")
    with pytest.raises(ValueError, match="x: must be bool, not 1"):
        typed(1, bool, "x")


def test_what_an_error_shows_is_short():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    values = [deep, ["x" * 10**6] * 10**4, {"\u2028": "\r\n"}, -(10**5000)]
    for value in values:
        text = short(value)
        assert len(text) <= 200
        assert len(text.splitlines()) == 1
    assert one_line("a\x85b\x1c\u2029c\n") == "a b c"
    assert one_line("x" * 300, 10) == "xxxxxxx..."
    assert one_line(KeyError()) == "KeyError"
