"""Files that a run has to write: what fails is said, and raised at the end."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Outputs:
    """Notes which files could not be written, so that a run goes on.

    Example
    -------
    >>> outputs = Outputs()
    >>> with outputs.writing():
    ...     raise OSError(28, "No space left on device", "plan.json")
    >>> outputs.check()
    Traceback (most recent call last):
    OSError: plan.json: No space left on device; make room and start the ...
    """

    def __init__(self) -> None:
        self._failed: dict[str, str] = {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Context whose failure to write is kept for the end."""
        try:
            yield
        except OSError as error:
            file = str(error.filename or "a file")
            reason = error.strerror or str(error)
            self._failed[file] = reason
            logger.warning("%s: %s; the run goes on", file, reason)

    def check(self) -> None:
        """Raises if something could not be written.

        Raises
        ------
        OSError
            Names the files.
        """
        if not self._failed:
            return
        reasons = "; ".join(dict.fromkeys(self._failed.values()))
        files, self._failed = ", ".join(self._failed), {}
        raise OSError(
            f"{files}: {reasons}; make room and start the same command again: "
            "it goes on from what could be kept"
        )
