"""What a forked process must not take over from its parent.

A fork copies the memory of a process, and of its threads the one that forks.
The other threads are gone, and whoever waits for them waits for ever: torch's
pool of threads, OpenVINO's, and those of any other library that has computed
with several.
"""

import ctypes
import functools
import logging
import os
from typing import Any

import torch

logger = logging.getLogger(__name__)

_users: dict[str, int] = {}


def used_before_fork(library: str) -> bool:
    """Whether a library has worked in a process that this one descends from.

    Arguments
    ---------
    library : str
        A name given to :func:`use_in_one_process`.

    Returns
    -------
    bool

    Example
    -------
    >>> used_before_fork("a library")
    False
    """
    return _users.get(library, os.getpid()) != os.getpid()


def use_in_one_process(library: str) -> None:
    """Notes that a library works in this process, and refuses to let it work
    in processes that are forked from now on.

    Arguments
    ---------
    library : str
        Its name, a backend.

    Raises
    ------
    RuntimeError
        It has worked in a process that this one descends from.

    Example
    -------
    >>> use_in_one_process("another library")
    >>> used_before_fork("another library")
    False
    """
    if _users.setdefault(library, os.getpid()) != os.getpid():
        raise RuntimeError(f"backend: {library} {REASON}")


#: Why a library does not work in a forked process.
REASON = (
    "was used before this process was forked, and its threads are not here; "
    "load the recognizer after the fork"
)


def keep_in_child(pid: int, *objects: Any) -> None:
    """Keeps objects of a parent process for ever: their destructors would
    wait for threads that are not here, at the latest when this process ends.

    Arguments
    ---------
    pid : int
        The process that made the objects; nothing is done in it.
    *objects
        What owns threads.
    """
    if pid != os.getpid():
        for thing in objects:
            keep(thing)


def keep(thing: Any) -> None:
    """Keeps an object to the end of the process, which does not destroy it
    either."""
    _add_reference(thing)


_add_reference = ctypes.pythonapi.Py_IncRef
_add_reference.argtypes = [ctypes.py_object]
_add_reference.restype = None

_in_child = False


@functools.cache
def protect_children() -> None:
    """Lets torch compute with one thread in processes that are forked from
    now on: it does not know that its other threads are gone."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_begin_child)


def _begin_child() -> None:
    global _in_child
    _in_child = True
    # At once: the first that computes need not be our code.
    torch.set_num_threads(1)


def in_child() -> bool:
    """Whether this process was forked after :func:`protect_children`."""
    return _in_child


def keep_to_one_thread() -> None:
    """Makes sure that torch computes with one thread in a child, and says so
    once; elsewhere does nothing."""
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
