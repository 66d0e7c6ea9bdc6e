"""Checks values that were read from a file against the types that are meant.

A file may hold anything: it was damaged, edited, or made by somebody else.
What is read goes through :func:`typed` before it is used, so that a wrong
value is one line that names its place and never an exception of some
library further on.
"""

import difflib
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

#: Integers of more bits than this are nobody's.
_MOST = 1 << 63
_MAX_TEXT = 200


def one_line(text: Any, limit: int = _MAX_TEXT) -> str:
    """A text as one line of an error message.

    Arguments
    ---------
    text : Any
        An exception or anything else that has a text.
    limit : int
        Number of characters after which it is cut off.

    Returns
    -------
    str

    Example
    -------
    >>> one_line(ValueError("first\\n  second"))
    'first second'
    """
    line = " ".join(str(text).split()) or type(text).__name__
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


class _Short(reprlib.Repr):
    """Values of any size and depth in few characters."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = 60

    def repr_int(self, x: int, level: int) -> str:
        if abs(x) >= _MOST:
            return f"<an integer of {x.bit_length()} bits>"
        return repr(x)


def short(value: Any) -> str:
    """A value as it stands in an error message: one short line.

    Arguments
    ---------
    value : Any
        Anything that a file may hold.

    Returns
    -------
    str

    Example
    -------
    >>> short("a\\nb"), short(10**5000)
    ("'a\\\\nb'", '<an integer of 16610 bits>')
    """
    return one_line(_Short().repr(value))


def typed(value: Any, hint: Any, where: str) -> Any:
    """Checks a value against a type.

    Arguments
    ---------
    value : Any
        As JSON or YAML gives it.
    hint : type
        ``int``, ``float``, ``str``, ``bool``, ``dict``, ``list``, ``Any``, a
        ``Literal``, a union with None, a list, tuple or mapping of such, or
        a dataclass of such.
    where : str
        Place of the value in its file: opens the error.

    Returns
    -------
    Any
        The value; whole numbers become floats where those are meant, lists
        become tuples, and mappings become dataclasses.

    Raises
    ------
    ValueError
        Names the first place whose value is wrong.

    Example
    -------
    >>> typed([1, 2], tuple[float, ...], "scores")
    (1.0, 2.0)
    >>> typed({"a": [True]}, dict[str, list[int]], "file")
    Traceback (most recent call last):
    ValueError: file.a[0]: must be int, not True
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _one_of(value, args, where)
    if origin is Literal:
        if value not in args or type(value) not in map(type, args):
            known = ", ".join(map(str, args))
            raise ValueError(
                f"{where}: must be one of {known}, not {short(value)}"
            )
        return value
    if is_dataclass(hint):
        return _dataclass(value, hint, where)
    if origin in (list, tuple, Sequence):
        return _items(value, origin, args, where)
    if origin in (dict, Mapping):
        rows = typed(value, dict, where)
        item = args[1]
        return {k: typed(v, item, inside(where, k)) for k, v in rows.items()}
    return _plain(value, hint, where)


def inside(where: str, key: Any) -> str:
    """Place of a key's value in a file.

    Example
    -------
    >>> inside("layers[0]", "quant"), inside("", "quant")
    ('layers[0].quant', 'quant')
    """
    name = one_line(key, 80)
    return f"{where}.{name}" if where else name


def unknown_key(key: Any, known: Sequence[str]) -> str:
    """What an error says about a key that nobody knows.

    Arguments
    ---------
    key : Any
        The key.
    known : sequence of str
        The keys that there are.

    Returns
    -------
    str

    Example
    -------
    >>> unknown_key("weight_bitz", ["method", "weight_bits"])
    "unknown key; did you mean 'weight_bits'?"
    """
    close = difflib.get_close_matches(str(key), known, n=1)
    if close:
        return f"unknown key; did you mean '{close[0]}'?"
    return f"unknown key; known keys: {', '.join(known)}"


def _one_of(value: Any, args: tuple, where: str) -> Any:
    if value is None and NoneType in args:
        return None
    wanted = [arg for arg in args if arg is not NoneType]
    for hint in wanted[:-1]:
        try:
            return typed(value, hint, where)
        except ValueError:
            continue
    return typed(value, wanted[-1], where)


def _items(value: Any, origin: Any, args: tuple, where: str) -> Any:
    values = typed(value, list, where)
    made = [typed(v, args[0], f"{where}[{i}]") for i, v in enumerate(values)]
    return tuple(made) if origin is tuple else made


def _plain(value: Any, hint: type, where: str) -> Any:
    good = isinstance(value, hint)
    if isinstance(value, bool):
        good = hint is bool
    elif isinstance(value, int) and hint in (int, float):
        good = -_MOST < value < _MOST
        value = hint(value) if good else value
    elif hint is float:
        good = good and math.isfinite(value)
    elif hint is list:
        good = isinstance(value, list | tuple)
    if not good:
        raise ValueError(f"{where}: must be {_name(hint)}, not {short(value)}")
    return value


def _name(hint: type) -> str:
    names = {list: "a list", dict: "an object", str: "text"}
    return names.get(hint, hint.__name__)


def _dataclass(value: Any, kind: type, where: str) -> Any:
    rows = typed(value, dict, where)
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind) if f.init}
    for key in rows:
        if key not in known:
            hint = unknown_key(key, list(known))
            raise ValueError(f"{inside(where, key)}: {hint}")
    for name, found in known.items():
        required = found.default is found.default_factory is MISSING
        if required and name not in rows:
            raise ValueError(f"{where}: lacks '{name}'")
    return kind(
        **{k: typed(v, hints[k], inside(where, k)) for k, v in rows.items()}
    )
