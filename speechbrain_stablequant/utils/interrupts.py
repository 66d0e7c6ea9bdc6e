"""Ctrl-C and SIGTERM during a run: one line that says how to continue."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from . import distributed

#: Exit status of a process that a signal has ended, as shells have it.
_ENDED = 128


class Interrupted(SystemExit, KeyboardInterrupt):
    """Ends the process without a traceback; recipes see KeyboardInterrupt."""


@contextlib.contextmanager
def explained(what: str, ends_process: bool) -> Iterator[None]:
    """Context whose interruption prints one line, ``what``.

    With ``ends_process``, SIGTERM interrupts too, and the process ends.
    Otherwise the interruption gets ``is_explained``, so that nothing is said
    again.
    """
    if getattr(signal.getsignal(signal.SIGINT), "before_a_run", False):
        # The command's, which ends the process at once while it imports.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    stack = _terminable() if ends_process else contextlib.nullcontext()
    try:
        with stack:
            yield
    except KeyboardInterrupt as error:
        _say(what)
        error.is_explained = True
        if not ends_process or isinstance(error, Interrupted):
            raise
        raise Interrupted(_ENDED + signal.SIGINT) from None


def _say(what: str) -> None:
    """Prints one line below all progress bars."""
    # They would be drawn over it when they are dropped.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    if distributed.is_main():
        print(f"quantize: interrupted; {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Context in which SIGTERM interrupts, unless something else handles it."""
    free = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        and distributed.size() == 1
    )
    if not free:
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a worker: as without this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise Interrupted(_ENDED + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
