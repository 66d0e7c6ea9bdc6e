"""Files of one user that others must not have written."""

import os
import stat
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def _owned(state: os.stat_result) -> bool:
    """Whether this user owns a file, where the system tells."""
    return os.name != "posix" or state.st_uid == os.geteuid()


def only_own(state: os.stat_result) -> bool:
    """Whether no other user can have written a file."""
    writable = os.name == "posix" and state.st_mode & _OTHERS
    return _owned(state) and not writable


def why_not_private(folder: Path) -> str | None:
    """Makes a folder private; returns why others may have written in it."""
    try:
        state = os.stat(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(state.st_mode):
        return "it is no folder"
    if not _owned(state):
        return "another user owns it"
    if os.name == "posix" and state.st_mode & 0o077:
        try:
            os.chmod(folder, 0o700)
        except OSError as error:
            if state.st_mode & _OTHERS:
                return f"others may write it: {error.strerror}"
    return None
