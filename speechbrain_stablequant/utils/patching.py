"""Attributes of objects that are others for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an instance attribute, and puts back what was there.

    Example
    -------
    >>> class Thing:
    ...     size = 1
    >>> thing = Thing()
    >>> with shadowed(thing, "size", 2):
    ...     thing.size
    2
    >>> thing.size, vars(thing)
    (1, {})
    """
    had = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
