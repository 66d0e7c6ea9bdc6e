"""Starts a recipe's script, and runs it as ``python SCRIPT ARGUMENTS`` does,
but that its block is checked before its YAML is loaded, and that Ctrl-C is one
line also before a run begins, such as while weights load.

Executed by its path, so that the script finds modules where it always does.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import hyperpyyaml

LINE = "stablequant: interrupted"
INTERRUPTED = 130
_IMPORTING = "<frozen importlib._bootstrap>"


@contextmanager
def ending_while_importing() -> Iterator[None]:
    """Context in which Ctrl-C during an import ends the process at once.

    There an exception may be swallowed, which leaves half a module, or abort
    the process in C++. As soon as a run begins, which has something to tell,
    ``utils.interrupts`` ends it.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    signal.signal(signal.SIGINT, _end_or_raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_or_raise(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            print(LINE, file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


_end_or_raise.before_a_run = True


def run(script: str) -> None:
    """Run a script whose arguments are in ``sys.argv``."""
    try:
        with ending_while_importing():
            runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt as error:
        # A run says how to continue, and ends the process.
        if isinstance(error, SystemExit):
            raise
        print(LINE, file=sys.stderr)
        sys.exit(INTERRUPTED)


def check_first(arguments: Sequence[str]) -> None:
    """Have the first YAML that is loaded wait for a check of the recipe's.

    The check imports torch, which is left to the script: what it sets before,
    such as environment variables, counts.
    """
    load, checked = hyperpyyaml.load_hyperpyyaml, []

    @wraps(load)
    def load_checked(*args: Any, **options: Any) -> Any:
        if not checked:
            checked.append(True)
            _check(arguments)
        return load(*args, **options)

    hyperpyyaml.load_hyperpyyaml = load_checked


def _check(arguments: Sequence[str]) -> None:
    from speechbrain_stablequant.brain.preflight import check_recipe
    from speechbrain_stablequant.utils.typed import one_line

    try:
        # Before the recipe loads its model, whatever the order of its YAML is.
        check_recipe(arguments)
    except ValueError as error:
        print(f"stablequant: {one_line(error, 600)}", file=sys.stderr)
        sys.exit(1)


def start(recipe: Sequence[str]) -> None:
    """Become a recipe's process."""
    script, *options = recipe
    if not Path(script).is_file():
        raise ValueError(f"{script}: there is no such script")
    if not options or not Path(options[0]).is_file():
        raise ValueError(f"{' '.join(options[:1]) or script}: give its YAML")
    try:
        text = Path(options[0]).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{options[0]}: is not UTF-8 ({error})") from error
    if not any(row.startswith("quantize:") for row in text.splitlines()):
        raise ValueError(
            f"{options[0]}: has no `quantize:` block; add "
            "`quantize: !apply:speechbrain_stablequant.register` and its keys"
        )
    command = [sys.executable, __file__, *recipe]
    if os.name == "nt":
        # There execv returns to the shell before the recipe has ended.
        sys.exit(subprocess.call(command))
    sys.stdout.flush()
    os.execv(sys.executable, command)


if __name__ == "__main__":
    del sys.argv[0]
    # From Python 3.11; with it, the script's folder is not searched.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    check_first(sys.argv[1:])
    # As Python's own ``__file__``, for a script that changes the folder.
    run(str(Path(sys.argv[0]).absolute()))
