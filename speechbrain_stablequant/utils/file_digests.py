"""Digests of files, remembered until the files change."""

import os
from typing import Any

from .files import file_digest
from .store import Store

_FILE = "file_digests.json"


class FileDigests:
    """Identifies files by content, remembered by path, size and time."""

    def __init__(self, store: Store):
        self.store = store
        known = store.read(_FILE, _FILE, "digests of files")
        self._known: dict[str, list] = known or {}
        self._found: dict[str, list] = {}

    def of(self, value: Any) -> Any:
        """Returns the digest of the file that a value names, or the value."""
        if not isinstance(value, str) or os.sep not in value:
            return value
        try:
            state = os.stat(value)
            if not os.path.isfile(value):
                return value
        except (OSError, ValueError):
            return value
        row = [state.st_size, state.st_mtime_ns]
        known = self._known.get(value)
        if known is None or known[:2] != row:
            known = [*row, file_digest(value)]
        self._found[value] = known
        return f"file {known[2]}"

    def keep(self) -> None:
        """Stores the digests that were computed."""
        if not self._found.items() <= self._known.items():
            self._known |= self._found
            self.store.write(_FILE, _FILE, self._known)
