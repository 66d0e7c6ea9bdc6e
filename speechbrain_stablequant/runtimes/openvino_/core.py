"""The one ``openvino.Core`` of a process."""

import functools
import os

import openvino as ov

from ...utils import forks


def core() -> ov.Core:
    """The process's own, which stays to its end.

    OpenVINO's CPU plugin gives the thread that first compiles a stack for
    signal handlers, and puts the one before it back when the ``Core`` goes,
    even if that is gone already: with two, the next signal (SIGINT) finds no
    stack, and the system ends the process with SIGSEGV (seen with 2026.4).

    Returns
    -------
    openvino.Core
        Another one in a forked process.
    """
    return _core(os.getpid())


@functools.cache
def _core(process: int) -> ov.Core:
    made = ov.Core()
    forks.keep(made)
    return made
