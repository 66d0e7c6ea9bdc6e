"""Files of one user that others must not have written."""

import os
import stat
from pathlib import Path


def owned(state: os.stat_result) -> bool:
    """Whether this user owns a file, where the system tells."""
    return os.name != "posix" or state.st_uid == os.geteuid()


def made_private(folder: Path, state: os.stat_result) -> str | None:
    """Makes a folder private; returns the reason if it stays writable by
    others."""
    if os.name != "posix" or not state.st_mode & 0o077:
        return None
    try:
        os.chmod(folder, 0o700)
    except OSError as error:
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write it: {error.strerror}"
    return None


def only_own(state: os.stat_result) -> bool:
    """Whether no other user can have written a file."""
    others = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return owned(state) and (os.name != "posix" or not others)
