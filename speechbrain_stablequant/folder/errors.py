"""Errors about a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..utils.typed import one_line


class CheckpointError(ValueError):
    """A quantized model on disk is damaged, mixed up or something else."""


class NoFolderError(ValueError):
    """A recipe that cannot be rebuilt from a folder, and why, in one line."""


@contextmanager
def reading(
    path: str | Path, wrong: str, advice: str = "copy or make it again"
) -> Iterator[None]:
    """Turns OSError and ValueError into a CheckpointError in one line."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path}: cannot be read ({reason})") from error
    except ValueError as error:
        reason = one_line(error, 400)
        raise CheckpointError(
            f"{path}: {wrong} ({reason}); {advice}"
        ) from error
