"""Everything that is remembered under a key, in one folder.

The key identifies all that the content depends on; a digest detects damage.
What cannot be written stays in memory, and one line says so.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .files import (
    json_digest,
    json_text,
    parse_json,
    read_file,
    remove_stale,
    why_not_private,
    write_atomic,
)
from .tensor_bytes import (
    bytes_to_tensors,
    metadata_of,
    tensors_digest,
    tensors_to_bytes,
    with_metadata,
)
from .typed import one_line

logger = logging.getLogger(__name__)

_PACKAGE = "speechbrain_stablequant"
_DAMAGED = "its content does not have its digest"


class Store:
    """Files of one folder, each under a key; in memory only without a folder.

    A ``private`` store decides what this user's later processes compute: files
    that others may have written are ignored, and damage is only a warning.
    """

    def __init__(self, folder: str | Path | None, private: bool = False):
        self.folder = None if folder is None else Path(folder)
        self.private = private
        # What could not be written yet: whole files, and lines of journals.
        self._unwritten: dict[str, bytes] = {}
        self._unwritten_rows: dict[str, list[bytes]] = {}
        self._below: dict[str, Store] = {}
        # Files that could not be written; shared with the stores below.
        self._complaints: list[str] = []
        if self.folder is None:
            return
        reason = why_not_private(self.folder) if private else None
        if reason is None:
            remove_stale(self.folder)
        else:
            logger.warning(
                "%s: is not used (%s); what it would hold is computed again by "
                "each process",
                self.folder,
                reason,
            )
            self.folder = None

    def below(self, name: str) -> "Store":
        """Returns the store of a subfolder, always the same object."""
        if not name:
            return self
        if name not in self._below:
            folder = None if self.folder is None else self.folder / name
            store = Store(folder, self.private)
            store._complaints = self._complaints
            self._below[name] = store
        return self._below[name]

    # -- one value ---------------------------------------------------------

    def write(self, name: str, key: str, content: Any) -> None:
        """Stores a JSON value under a key, replacing the file."""
        # As it is read again: with text for the keys of dictionaries.
        record = json.loads(json_text({"key": key, "content": content}, name))
        record["sha256"] = json_digest([key, record["content"]])
        self._put(name, json_text(record, name).encode())

    def read(
        self,
        name: str,
        key: str,
        what: str,
        parse: Callable[[Any], Any] = lambda content: content,
    ) -> Any:
        """Returns a stored value, or None if there is none under this key.

        ``what`` names it in errors; ``parse`` raises ValueError if damaged.
        """
        found, content = self._record(name, what)
        if found != key:
            return None
        try:
            return parse(content)
        except ValueError as error:
            return self._damaged(name, what, one_line(error))

    def check(self, name: str, what: str) -> None:
        """Raises if a file that :meth:`write` wrote is damaged."""
        self._record(name, what)

    def _record(self, name: str, what: str) -> tuple[str | None, Any]:
        """Key and value of a file; None for files of earlier versions."""
        data = self._get(name, what)
        if data is None:
            return None, None
        try:
            record = parse_json(data)
        except ValueError as error:
            reason = f"it is not valid JSON ({one_line(error)})"
            return None, self._damaged(name, what, reason)
        if not isinstance(record, dict) or "sha256" not in record:
            return None, None
        key, content = record.get("key"), record.get("content")
        if record["sha256"] != json_digest([key, content]):
            return None, self._damaged(name, what, _DAMAGED)
        return key, content

    def update(
        self, name: str, key: str, changes: Mapping[str, Any], what: str
    ) -> dict[str, Any]:
        """Adds entries to a stored dictionary; concurrent ones may be lost."""
        content = {**(self.read(name, key, what) or {}), **changes}
        self.write(name, key, content)
        return content

    # -- tensors -----------------------------------------------------------

    def write_tensors(
        self,
        name: str,
        key: str,
        tensors: Mapping[str, torch.Tensor],
        content: Any = None,
    ) -> None:
        data = tensors_to_bytes(tensors, {})
        metadata = {"key": key, "content": json.dumps(content)}
        digest = json_digest([metadata, tensors_digest(data)])
        self._put(name, with_metadata(data, {**metadata, "sha256": digest}))

    def read_tensors(
        self, name: str, key: str, what: str
    ) -> tuple[dict[str, torch.Tensor], Any] | None:
        data = self._get(name, what)
        if data is None:
            return None
        try:
            metadata = metadata_of(data)
            if metadata.get("key") != key:
                return None
            digest = metadata.pop("sha256")
            if digest != json_digest([metadata, tensors_digest(data)]):
                return self._damaged(name, what, _DAMAGED)
            tensors, _ = bytes_to_tensors(data)
            return tensors, json.loads(metadata["content"])
        except (ValueError, KeyError, RecursionError) as error:
            return self._damaged(name, what, one_line(error))

    # -- a journal ---------------------------------------------------------

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Adds a line to a journal."""
        row = json.loads(json.dumps(row, allow_nan=False))
        line = json.dumps({**row, "check": json_digest(row)[:8]}) + "\n"
        self._unwritten_rows.setdefault(name, []).append(line.encode())
        self._write_rows(name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Returns the lines of a journal; half a line at the end is cut off."""
        data = self._get(name, "journal") or b""
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            self._try(name, os.truncate, self.folder / name, whole)
        data = data[:whole] + b"".join(self._unwritten_rows.get(name, []))
        rows = []
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                row = parse_json(line)
                check = row.pop("check", None)
                good = check in (None, json_digest(row)[:8])
            except (ValueError, AttributeError, RecursionError, TypeError):
                good = False
            if not good:
                raise self.damaged_row(name, number)
            rows.append(row)
        return rows

    def damaged_row(self, name: str, number: int) -> ValueError:
        return ValueError(
            f"{self.folder / name}: line {number} is damaged; delete the "
            "file, and it is measured again"
        )

    # -- files -------------------------------------------------------------

    def names(self, pattern: str = "*") -> list[str]:
        """Returns the sorted names of the files that match a glob pattern."""
        found = {n for n in self._unwritten if Path(n).match(pattern)}
        if self.folder is not None:
            found |= {path.name for path in self.folder.glob(pattern)}
        return sorted(found)

    def flush(self) -> None:
        """Writes what could not be written before, if there is room now."""
        self._write_files()
        for name, lines in self._unwritten_rows.items():
            if lines:
                self._write_rows(name)
        for store in self._below.values():
            store.flush()

    def delete(self, name: str) -> None:
        self._unwritten.pop(name, None)
        self._unwritten_rows.pop(name, None)
        if self.folder is not None:
            self._try(name, (self.folder / name).unlink, True)

    def _get(self, name: str, what: str) -> bytes | None:
        if name in self._unwritten:
            return self._unwritten[name]
        if self.folder is None:
            return None
        try:
            return read_file(self.folder / name, self.private)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return self._damaged(name, what, error.strerror or str(error))

    def _put(self, name: str, data: bytes) -> None:
        self._unwritten.pop(name, None)
        self._unwritten[name] = data
        self._write_files()

    def _write_files(self) -> None:
        """Writes the newest file, and then what there was no room for."""
        for name, data in reversed(list(self._unwritten.items())):
            if not self._try(name, self._write_file, name, data):
                break
            # Another thread may have written it, or a newer one, meanwhile.
            if self._unwritten.get(name) is data:
                self._unwritten.pop(name, None)

    def _write_file(self, name: str, data: bytes) -> None:
        self._make_folder()
        mode = 0o600 if self.private else 0o666
        write_atomic(self.folder / name, data, mode)

    def _write_rows(self, name: str) -> None:
        lines = self._unwritten_rows[name]
        if self._try(name, self._append, name, b"".join(lines)):
            lines.clear()

    def _append(self, name: str, data: bytes) -> None:
        self._make_folder()
        with open(self.folder / name, "ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                # No half line in front of the next one.
                file.truncate(start)
                raise

    def _make_folder(self) -> None:
        mode = 0o700 if self.private else 0o777
        self.folder.mkdir(mode, parents=True, exist_ok=True)

    def _try(self, name: str, write: Callable, *arguments: Any) -> bool:
        """Whether something could be written; warns of the first failure."""
        if self.folder is None:
            return False
        try:
            write(*arguments)
            return True
        except OSError as error:
            # The cause of our own error has the plain reason.
            first = error.__cause__ or error
        if not self._complaints:
            logger.warning(
                "%s: cannot be written (%s); this process goes on with what it "
                "has in memory, another one computes it again",
                self.folder / name,
                getattr(first, "strerror", None) or first,
            )
        self._complaints.append(name)
        return False

    def _damaged(self, name: str, what: str, reason: str) -> None:
        line = f"{what}: cannot read '{self.folder / name}': {reason}"
        if not self.private:
            raise ValueError(f"{line}; delete it, and it is made again")
        logger.warning("%s; it is computed again", line)


def machine_store(name: str) -> Store:
    """Returns this user's store for this machine."""
    return _private_store(cache_folder(), name)


@functools.cache
def _private_store(folder: Path | None, name: str) -> Store:
    """One store per process, so that its memory is shared."""
    return Store(None if folder is None else folder / name, private=True)


def cache_folder() -> Path | None:
    """This package's cache folder by the XDG convention, if there is a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / _PACKAGE
    try:
        return Path.home() / ".cache" / _PACKAGE
    except RuntimeError:
        return None
