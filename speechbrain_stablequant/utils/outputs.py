"""Files that a run must write: failures are logged, and raised at the end."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Outputs:
    """Records which files could not be written, so that the run continues."""

    def __init__(self) -> None:
        self._failed: dict[str, str] = {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Context whose failure to write is recorded."""
        try:
            yield
        except OSError as error:
            file = str(error.filename or "a file")
            reason = error.strerror or str(error)
            self._failed[file] = reason
            logger.warning("%s: %s; the run goes on", file, reason)

    def check(self) -> None:
        """Raises if a file could not be written."""
        if not self._failed:
            return
        reasons = "; ".join(dict.fromkeys(self._failed.values()))
        files, self._failed = ", ".join(self._failed), {}
        raise OSError(
            f"{files}: {reasons}; make room and start the same command again: "
            "it goes on from what could be kept"
        )
