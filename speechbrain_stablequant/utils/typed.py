"""Checks values from a file or a user against types, and rules of dataclasses.

A file may be damaged, edited or foreign. Values pass :func:`typed` before use,
so that a wrong one gives one line that names its place.
"""

import difflib
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_MOST = 1 << 63  #: limit of integers
_MAX_TEXT = 200


def one_line(text: Any, limit: int = _MAX_TEXT) -> str:
    """Returns a text as one line, cut off at ``limit`` characters."""
    line = " ".join(str(text).split()) or type(text).__name__
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


class _Short(reprlib.Repr):
    """Shortens values of any size and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = 60

    def repr_int(self, x: int, level: int) -> str:
        if abs(x) >= _MOST:
            return f"<an integer of {x.bit_length()} bits>"
        return repr(x)


def short(value: Any) -> str:
    """Returns a value as one short line for an error message."""
    return one_line(_Short().repr(value))


def option(default: Any, good: Callable[[Any], bool], rule: str) -> Any:
    """A field whose value must be ``good``; ``rule`` completes "must be"."""
    return field(default=default, metadata={"good": good, "rule": rule})


def choice(default: str | None, *names: str, repr: bool = True) -> Any:
    return field(default=default, repr=repr, metadata={"choices": names})


def positive(default: float) -> Any:
    return option(default, lambda x: 0 < x < math.inf, "positive and finite")


def not_negative(default: float) -> Any:
    return option(
        default, lambda x: 0 <= x < math.inf, "finite and not negative"
    )


def fraction(default: float) -> Any:
    return option(default, lambda x: 0 <= x <= 1, "a fraction from 0 to 1")


def count(default: int | None, least: int = 1) -> Any:
    return option(default, lambda n: n >= least, f"at least {least}")


def typed(value: Any, hint: Any, where: str) -> Any:
    """Checks a value from JSON or YAML against a type and returns it converted.

    Takes plain types, ``Any``, ``Literal``, unions with None, lists, tuples,
    mappings and dataclasses of these, with the rules of their fields. A text
    is also a tuple of one text. ``where`` is the value's place and opens the
    error.
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
    name = one_line(key, 80)
    return f"{where}.{name}" if where else name


def unknown_key(key: Any, known: Sequence[str]) -> str:
    """Returns the error text for an unknown key, with the closest known one."""
    close = difflib.get_close_matches(str(key), known, n=1)
    if close:
        return f"unknown key; did you mean '{close[0]}'?"
    return f"unknown key; known keys: {', '.join(known)}"


def unknown_name(name: Any, known: Sequence[str]) -> str:
    """Returns the error text for an unknown choice, with the closest one."""
    text = f"{short(name)} is not one of {', '.join(known)}"
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"{text}; did you mean '{close[0]}'?" if close else text


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
    if origin is tuple and args[0] is str and isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        item = getattr(args[0], "__name__", args[0])
        raise ValueError(
            f"{where}: must be a list of {item}, not {short(value)}"
        )
    made = [typed(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
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
    names = {list: "a list", dict: "a block of keys"}
    return names.get(hint, hint.__name__)


def _dataclass(value: Any, kind: type, where: str) -> Any:
    rows = typed(value, dict, where)
    known = {f.name: f for f in fields(kind) if f.init}
    for key in rows:
        if key not in known:
            blocks = [
                f"{name}.{key}"
                for name, block in get_type_hints(kind).items()
                if is_dataclass(block)
                and any(part.name == key for part in fields(block))
            ]
            hint = unknown_key(key, blocks or list(known))
            raise ValueError(f"{inside(where, key)}: {hint}")
    for name, found in known.items():
        required = found.default is found.default_factory is MISSING
        if required and name not in rows:
            raise ValueError(f"{where}: lacks '{name}'")
    hints = get_type_hints(kind)
    return kind(
        **{
            name: _field(
                value, hints[name], known[name].metadata, inside(where, name)
            )
            for name, value in rows.items()
        }
    )


def _field(value: Any, hint: Any, rule: Mapping[str, Any], where: str) -> Any:
    """:func:`typed` for a dataclass's field, with the rule in its metadata."""
    # A rule for a number decides about infinity, too.
    if not (rule and hint is float and isinstance(value, float)):
        value = typed(value, hint, where)
    if value is None or not rule:
        return value
    if "choices" in rule and value not in rule["choices"]:
        raise ValueError(f"{where}: {unknown_name(value, rule['choices'])}")
    if "good" in rule and not rule["good"](value):
        raise ValueError(f"{where}: must be {rule['rule']}, not {short(value)}")
    return value
