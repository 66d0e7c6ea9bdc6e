"""Temporary replacement of attributes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an instance attribute, and restores the previous state."""
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


@contextmanager
def restored(owner: Any) -> Iterator[None]:
    """Restores all attributes of an object."""
    attributes = vars(owner).copy()
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(attributes)
