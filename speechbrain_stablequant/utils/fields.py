"""Options as dataclasses: fields with a rule, and blocks of keys checked.

Unlike :mod:`.typed`, which checks machine-written files, this takes what a
user writes in YAML: one name for a list, paths for texts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .typed import inside, short, typed, unknown_key


def option(default: Any, good: Callable[[Any], bool], rule: str) -> Any:
    """A field whose value must be ``good``; ``rule`` completes "must be"."""
    return field(default=default, metadata={"good": good, "rule": rule})


def choice(default: str | None, *names: str) -> Any:
    """A field whose value must be one of some names."""
    return field(default=default, metadata={"choices": names})


def positive(default: float) -> Any:
    """A field whose value must be positive and finite."""
    return option(default, lambda x: 0 < x < math.inf, "positive and finite")


def not_negative(default: float) -> Any:
    """A field whose value must be finite and not negative."""
    return option(
        default, lambda x: 0 <= x < math.inf, "finite and not negative"
    )


def fraction(default: float) -> Any:
    """A field whose value must be from 0 to 1."""
    return option(default, lambda x: 0 <= x <= 1, "a fraction from 0 to 1")


def count(default: int | None) -> Any:
    """A field whose value must be at least 1."""
    return option(default, lambda n: n >= 1, "at least 1")


def build(cls: type, block: Any, path: str) -> Any:
    """Builds a dataclass from a block of keys and checks every value.

    Arguments
    ---------
    cls : type
        A dataclass, with sub-blocks as fields that are dataclasses.
    block : Mapping
        As read from YAML.
    path : str
        Place of the block in its file; opens each error.

    Returns
    -------
    Any
        An instance of ``cls``.

    Raises
    ------
    ValueError
        Names the first wrong key and says what it must be.

    Example
    -------
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Options:
    ...     threads: int = count(1)
    >>> build(Options, {"threads": 2}, "cpu")
    Options(threads=2)
    >>> build(Options, {"threads": 0}, "cpu")
    Traceback (most recent call last):
    ValueError: cpu.threads: must be at least 1, not 0
    """
    if not isinstance(block, Mapping):
        raise ValueError(f"{path}: must be a block of keys, not {short(block)}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    values = {}
    for key, value in block.items():
        where = inside(path, key)
        if key not in known:
            raise ValueError(f"{where}: {unknown_key(key, list(known))}")
        if is_dataclass(hints[key]):
            values[key] = build(hints[key], value, where)
        else:
            values[key] = _convert(value, hints[key], where)
            _check_value(values[key], known[key].metadata, where)
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Checks a value against a type; lists become tuples."""
    if get_origin(hint) is UnionType:
        if value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if isinstance(value, str) and item is str:
            return (value,)
        if not isinstance(value, list | tuple):
            raise ValueError(
                f"{where}: must be a list of {item.__name__}, not "
                f"{short(value)}"
            )
        return tuple(_convert(v, item, where) for v in value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and isinstance(value, float):
        return value
    if is_number and hint in (int, float):
        # Refuses integers of absurd size.
        return typed(value, hint, where)
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint is dict and isinstance(value, Mapping):
        return {
            k: str(v) if isinstance(v, Path) else v for k, v in value.items()
        }
    if not isinstance(value, hint) or (hint is int and not is_number):
        raise ValueError(
            f"{where}: must be {hint.__name__}, not {short(value)}"
        )
    return value


def _check_value(value: Any, metadata: Mapping[str, Any], where: str) -> None:
    """Checks a value against the rule of its field, see :func:`option`."""
    if value is None:
        return
    choices = metadata.get("choices")
    if choices is not None and value not in choices:
        raise ValueError(
            f"{where}: '{value}' is not one of {', '.join(choices)}"
        )
    if "good" in metadata and not metadata["good"](value):
        raise ValueError(
            f"{where}: must be {metadata['rule']}, not {short(value)}"
        )
