"""What a forked process, which has one thread, must not take over."""

import ctypes
import functools
import logging
import os
import threading
from typing import Any

import torch

logger = logging.getLogger(__name__)

_users: dict[str, int] = {}


def used_before_fork(library: str) -> bool:
    """Whether a library was used in a process that this one descends from."""
    return _users.get(library, os.getpid()) != os.getpid()


def use_in_one_process(library: str) -> None:
    """Marks a library as used; raises in processes forked later."""
    if _users.setdefault(library, os.getpid()) != os.getpid():
        raise RuntimeError(f"backend: {library} {REASON}")


#: Why a library does not work in a forked process.
REASON = (
    "was used before this process was forked, and its threads are not here; "
    "load the recognizer after the fork"
)


def keep_in_child(pid: int, *objects: Any) -> None:
    """Keeps a parent's objects, whose destructors would wait for threads."""
    if pid != os.getpid():
        for thing in objects:
            keep(thing)


#: Keeps an object until the process ends, without destroying it then.
keep = ctypes.PYFUNCTYPE(None, ctypes.py_object)(
    ("Py_IncRef", ctypes.pythonapi)
)


class ProcessLock:
    """A lock for each process: in a child, a thread of the parent may have held
    the parent's for ever. Copies have locks of their own."""

    def __init__(self) -> None:
        self._locks: dict[int, threading.Lock] = {}

    def __deepcopy__(self, memo: dict) -> "ProcessLock":
        return ProcessLock()

    def __enter__(self) -> None:
        self._locks.setdefault(os.getpid(), threading.Lock()).acquire()

    def __exit__(self, *error: Any) -> None:
        self._locks[os.getpid()].release()


_in_child = False


@functools.cache
def protect_children() -> None:
    """Makes torch use one thread in processes forked from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_begin_child)


def _begin_child() -> None:
    global _in_child
    _in_child = True
    # Immediately: other code may compute first.
    torch.set_num_threads(1)


def in_child() -> bool:
    """Whether this process was forked after :func:`protect_children`."""
    return _in_child


def keep_to_one_thread() -> None:
    """In a child, makes torch use one thread, and warns once."""
    if _in_child:
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
        _say_once(os.getpid())


@functools.cache
def _say_once(pid: int) -> None:
    logger.warning(
        "process %d was forked from one that had loaded a recognizer: torch "
        "computes with one thread here; fork first and load then for more",
        pid,
    )
