"""The single ``openvino.Core`` of a process."""

import functools
import os

import openvino as ov

from ...utils import forks


def core() -> ov.Core:
    """The ``Core`` of this process, kept until its end; a forked process has
    its own.

    OpenVINO's CPU plugin gives the thread that compiles first a stack for
    signal handlers, and restores the previous one when the ``Core`` goes, even
    if that was freed: with two cores the next signal (SIGINT) ends the process
    with SIGSEGV (seen with 2026.4).
    """
    return _core(os.getpid())


@functools.cache
def _core(process: int) -> ov.Core:
    made = ov.Core()
    forks.keep(made)
    return made
