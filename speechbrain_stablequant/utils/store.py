"""Everything that is remembered under a key, in one folder.

What was measured is kept so that a run that was killed goes on, and so that a
machine is asked only once. The key identifies all that the content depends
on: what was kept under another key is not there. Content is checked by a
digest, so a damaged file is never believed.

Nothing is lost when a folder cannot be written (a full disk, a folder that
became read-only): one line says so, and what would be in the file is kept in
memory.
"""

import functools
import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .files import json_text, parse_json, read_file, remove_stale, write_atomic
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


class Store:
    """Files of one folder, each under a key.

    Arguments
    ---------
    folder : str, Path or None
        Where to; made when something is written. None: in memory only.
    private : bool
        Whether the files decide what a later process of this user computes,
        as those of a cache in the user's home do. Then the folder is made for
        the user alone, files of another owner or that others may write are
        not believed, and a damaged one is only warned of.

    Example
    -------
    >>> store = Store(getfixture("tmp_path") / "new")
    >>> store.write("sizes.json", "model A", {"units": [1, 2]})
    >>> store.read("sizes.json", "model A", "sizes")
    {'units': [1, 2]}
    >>> store.read("sizes.json", "model B", "sizes")
    """

    def __init__(self, folder: str | Path | None, private: bool = False):
        self.folder = None if folder is None else Path(folder)
        self.private = private
        self._unwritten: dict[str, bytes] = {}
        self._unwritten_rows: dict[str, list[bytes]] = {}
        self._below: dict[str, Store] = {}
        #: Whether it was said that something cannot be written; shared with
        #: the stores below.
        self._complaints: list[str] = []
        if private and self.folder is not None and not self._is_own():
            self.folder = None
        if self.folder is not None:
            remove_stale(self.folder)

    def below(self, name: str) -> "Store":
        """The store of a folder in this one.

        Arguments
        ---------
        name : str
            Of the folder; empty for this one itself.

        Returns
        -------
        Store
            Always the same one.
        """
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
        """Keeps a value.

        Arguments
        ---------
        name : str
            Of the file; a value that it held before is replaced.
        key : str
            Identifies all that the value depends on.
        content : Any
            Dictionaries, lists, strings, numbers, booleans and None.
        """
        text = json_text({"key": key, "content": content}, name)
        # As it is read again: with text for the keys of dictionaries.
        record = json.loads(text)
        record["sha256"] = _digest([key, record["content"]])
        self._put(name, json_text(record, name).encode())

    def read(
        self,
        name: str,
        key: str,
        what: str,
        parse: Callable[[Any], Any] = lambda content: content,
    ) -> Any:
        """A value that was kept.

        Arguments
        ---------
        name : str
            Of the file.
        key : str
            As in :meth:`write`.
        what : str
            What the file is to the user: opens an error.
        parse : callable
            Makes of the value what is given back; a ValueError says that the
            file is damaged.

        Returns
        -------
        Any
            None where there is none, or one of another key.

        Raises
        ------
        ValueError
            The file is damaged: names it and says what to do.
        """
        found, content = self._record(name, what)
        if found is None or found != key:
            return None
        try:
            return parse(content)
        except ValueError as error:
            return self._damaged(name, what, one_line(error))

    def check(self, name: str, what: str) -> None:
        """Raises if a file that :meth:`write` wrote is damaged.

        Arguments
        ---------
        name, what : str
            As in :meth:`read`.

        Raises
        ------
        ValueError
            Names the file and says what to do.
        """
        self._record(name, what)

    def _record(self, name: str, what: str) -> tuple[str | None, Any]:
        """Key and value of a file; None for what earlier versions wrote."""
        data = self._get(name, what)
        if data is None:
            return None, None
        try:
            record = parse_json(data)
            if not isinstance(record, dict) or "sha256" not in record:
                return None, None
            key, content = record["key"], record["content"]
            good = record["sha256"] == _digest([key, content])
        except (ValueError, RecursionError) as error:
            reason = f"it is not valid JSON ({one_line(error)})"
            return None, self._damaged(name, what, reason)
        except KeyError as error:
            return None, self._damaged(name, what, f"it has no {error}")
        if not good:
            return None, self._damaged(name, what, "its digest is another")
        return key, content

    def update(
        self, name: str, key: str, changes: Mapping[str, Any], what: str
    ) -> dict[str, Any]:
        """Adds entries to a value that is a dictionary.

        Of two processes that do so in the same moment one may be forgotten:
        for what can be measured again.

        Arguments
        ---------
        name, key, what : str
            As in :meth:`read`.
        changes : Mapping
            The entries.

        Returns
        -------
        dict
            All entries.

        Example
        -------
        >>> store = Store(getfixture("tmp_path"))
        >>> store.update("tiles.json", "k", {"a": 1}, "tiles")
        {'a': 1}
        >>> store.update("tiles.json", "k", {"b": 2}, "tiles")
        {'a': 1, 'b': 2}
        """
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
        """Keeps tensors, and a value that belongs to them.

        Arguments
        ---------
        name : str
            Of the file, a safetensors file.
        key : str
            Identifies all that they depend on.
        tensors : Mapping
            Tensors by name.
        content : Any
            As in :meth:`write`.

        Example
        -------
        >>> store = Store(getfixture("tmp_path"))
        >>> store.write_tensors("a.safetensors", "k", {"x": torch.ones(1)}, 5)
        >>> store.read_tensors("a.safetensors", "k", "layer")
        ({'x': tensor([1.])}, 5)
        """
        data = tensors_to_bytes(tensors, {})
        metadata = {"key": key, "content": json.dumps(content)}
        digest = _digest([metadata, tensors_digest(data)])
        self._put(name, with_metadata(data, {**metadata, "sha256": digest}))

    def read_tensors(
        self, name: str, key: str, what: str
    ) -> tuple[dict[str, torch.Tensor], Any] | None:
        """Tensors that were kept, and their value.

        Arguments
        ---------
        name, key, what : str
            As in :meth:`read`.

        Returns
        -------
        tuple or None
            None where there are none, or those of another key.

        Raises
        ------
        ValueError
            The file is damaged: names it and says what to do.
        """
        data = self._get(name, what)
        if data is None:
            return None
        try:
            metadata = metadata_of(data)
            if metadata.get("key") != key:
                return None
            digest = metadata.pop("sha256")
            if digest != _digest([metadata, tensors_digest(data)]):
                return self._damaged(name, what, "its digest is another")
            tensors, _ = bytes_to_tensors(data)
            return tensors, json.loads(metadata["content"])
        except (ValueError, KeyError, RecursionError) as error:
            return self._damaged(name, what, one_line(error))

    # -- a journal ---------------------------------------------------------

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Adds a line to a journal.

        Arguments
        ---------
        name : str
            Of the file.
        row : Mapping
            What :meth:`write` takes; its entries should identify what they
            depend on.

        Example
        -------
        >>> store = Store(getfixture("tmp_path"))
        >>> store.append("search.jsonl", {"key": "k", "errors": 3})
        >>> store.rows("search.jsonl")
        [{'key': 'k', 'errors': 3}]
        """
        row = json.loads(json.dumps(row, allow_nan=False))
        line = json.dumps({**row, "check": _digest(row)[:8]}) + "\n"
        self._unwritten_rows.setdefault(name, []).append(line.encode())
        self._write_rows(name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of a journal.

        Half a line that a kill has left at the end is cut off.

        Arguments
        ---------
        name : str
            Of the file.

        Returns
        -------
        list of dict
            Of all lines; those of earlier versions carry no digest and may
            hold anything.

        Raises
        ------
        ValueError
            Names the file and the damaged line.
        """
        data = self._get(name, "journal") or b""
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            self._cut(name, whole)
        data = data[:whole] + b"".join(self._unwritten_rows.get(name, []))
        rows = []
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                row = parse_json(line)
                check = row.pop("check", None)
                good = check in (None, _digest(row)[:8])
            except (ValueError, AttributeError, RecursionError, TypeError):
                good = False
            if not good:
                raise self.damaged_row(name, number)
            rows.append(row)
        return rows

    def damaged_row(self, name: str, number: int) -> ValueError:
        """The error about a line that cannot be used.

        Arguments
        ---------
        name : str
            Of the file.
        number : int
            Of the line, beginning with 1.

        Returns
        -------
        ValueError
        """
        return ValueError(
            f"{self.folder / name}: line {number} is damaged; delete the "
            "file, and it is measured again"
        )

    # -- files -------------------------------------------------------------

    def names(self, pattern: str = "*") -> list[str]:
        """Names of the files, sorted.

        Arguments
        ---------
        pattern : str
            As of ``Path.glob``.

        Returns
        -------
        list of str
        """
        found = {n for n in self._unwritten if Path(n).match(pattern)}
        if self.folder is not None:
            found |= {path.name for path in self.folder.glob(pattern)}
        return sorted(found)

    def flush(self) -> None:
        """Writes what could not be written before, if there is room now."""
        for name, data in list(self._unwritten.items()):
            if not self._try(name, self._write_file, name, data):
                break
            del self._unwritten[name]
        for name, lines in self._unwritten_rows.items():
            if lines:
                self._write_rows(name)
        for store in self._below.values():
            store.flush()

    def delete(self, name: str) -> None:
        """Forgets a file, if there is one.

        Arguments
        ---------
        name : str
            Of the file.
        """
        self._unwritten.pop(name, None)
        self._unwritten_rows.pop(name, None)
        if self.folder is None:
            return
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            self._complain(name, error)

    def _get(self, name: str, what: str) -> bytes | None:
        if name in self._unwritten:
            return self._unwritten[name]
        if self.folder is None:
            return None
        path = self.folder / name
        try:
            if not self.private:
                return read_file(path)
            if path.exists() and not path.is_file():
                return self._damaged(name, what, "is no regular file")
            # The file that is checked is the one that is read.
            with open(path, "rb") as file:
                if not _only_own(os.fstat(file.fileno())):
                    return self._damaged(
                        name, what, "another user owns it or may write it"
                    )
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return self._damaged(name, what, error.strerror or str(error))

    def _put(self, name: str, data: bytes) -> None:
        self._unwritten[name] = data
        if self._try(name, self._write_file, name, data):
            del self._unwritten[name]
            # There may be room again for what had none.
            for other, earlier in list(self._unwritten.items()):
                if not self._try(other, self._write_file, other, earlier):
                    break
                del self._unwritten[other]

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

    def _cut(self, name: str, size: int) -> None:
        def cut() -> None:
            with open(self.folder / name, "r+b") as file:
                file.truncate(size)

        self._try(name, cut)

    def _make_folder(self) -> None:
        if self.private:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)

    def _try(self, name: str, write: Any, *arguments: Any) -> bool:
        """Whether something could be written."""
        if self.folder is None:
            return False
        try:
            write(*arguments)
        except OSError as error:
            self._complain(name, error)
            return False
        return True

    def _complain(self, name: str, error: OSError) -> None:
        """Says once what is kept in memory only."""
        if self._complaints:
            return
        self._complaints.append(name)
        # Below ours, the system's own error has the plain reason.
        first = error.__cause__ or error
        logger.warning(
            "%s: cannot be written (%s); this process goes on with what it "
            "has in memory, another one computes it again",
            self.folder / name,
            getattr(first, "strerror", None) or first,
        )

    def _damaged(self, name: str, what: str, reason: str) -> None:
        line = f"{what}: cannot read '{self.folder / name}': {reason}"
        if not self.private:
            raise ValueError(f"{line}; delete it, and it is made again")
        logger.warning("%s; it is computed again", line)

    def _is_own(self) -> bool:
        """Whether a private folder is not there yet, or is the user's own,
        which others may not write from now on."""
        try:
            state = os.stat(self.folder)
        except FileNotFoundError:
            return True
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            if not stat.S_ISDIR(state.st_mode):
                reason = "it is no folder"
            elif not _owned(state):
                reason = "another user owns it"
            else:
                reason = _made_private(self.folder, state)
                if reason is None:
                    return True
        logger.warning(
            "%s: is not used (%s); what it would hold is computed again by "
            "each process",
            self.folder,
            reason,
        )
        return False


def machine_store(name: str) -> Store:
    """What is remembered for this user about this machine.

    Arguments
    ---------
    name : str
        Of the folder in the user's cache.

    Returns
    -------
    Store
        In memory only for a user without a home.

    Example
    -------
    >>> machine_store("triton").private
    True
    """
    return _private_store(cache_folder(), name)


@functools.cache
def _private_store(folder: Path | None, name: str) -> Store:
    """One for a process: what cannot be written is in its memory."""
    return Store(None if folder is None else folder / name, private=True)


def cache_folder() -> Path | None:
    """Where this package keeps files for a user, as XDG has it.

    Returns
    -------
    Path or None
        None for a user without a home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / _PACKAGE
    try:
        return Path.home() / ".cache" / _PACKAGE
    except RuntimeError:
        return None


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _owned(state: os.stat_result) -> bool:
    """Whether this user owns a file; there are systems that do not tell."""
    return os.name != "posix" or state.st_uid == os.geteuid()


def _made_private(folder: Path, state: os.stat_result) -> str | None:
    """Keeps others out of a folder; says why it cannot be used."""
    if os.name != "posix" or not state.st_mode & 0o077:
        return None
    try:
        os.chmod(folder, 0o700)
    except OSError as error:
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write it: {error.strerror}"
    return None


def _only_own(state: os.stat_result) -> bool:
    """Whether no other user can have written a file."""
    others = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return _owned(state) and (os.name != "posix" or not others)
