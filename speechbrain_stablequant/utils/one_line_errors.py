"""This package's errors end a recipe in one line; all others as they did.

The traceback of such an error goes to the recipe's log at debug level.
"""

import dis
import logging
import sys
from types import TracebackType

from .typed import one_line

logger = logging.getLogger(__name__)

_PACKAGE = __name__.partition(".")[0]
# What users are told by; others are faults of the code.
_TOLD = (ImportError, OSError, ValueError)
_MAX_LINE = 1000


def end_in_one_line() -> None:
    """Wraps the ``sys.excepthook`` of Python or of SpeechBrain, which replaces
    it when a recipe's folder is made; one of others stays."""
    original = sys.excepthook
    owner = str(getattr(original, "__module__", None))
    if owner.partition(".")[0] not in ("sys", "speechbrain"):
        return

    def hook(
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        if not _is_told(error, trace):
            original(kind, error, trace)
            return
        logger.debug("the run ends", exc_info=(kind, error, trace))
        print(f"stablequant: {one_line(error, _MAX_LINE)}", file=sys.stderr)

    sys.excepthook = hook


def _is_told(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether a ``raise`` of this package made an error for users; what fails
    inside its expressions, or in others' code that it calls, is none."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not _is_ours(trace.tb_frame.f_globals.get("__name__")):
        return False
    operation = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    return dis.opname[operation] == "RAISE_VARARGS" and (
        isinstance(error, _TOLD) or _is_ours(type(error).__module__)
    )


def _is_ours(module: str | None) -> bool:
    return str(module).partition(".")[0] == _PACKAGE
