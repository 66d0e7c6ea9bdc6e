"""One run at a time in an output folder."""

import contextlib
import json
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path

import filelock

from .files import process_is_alive, write_json

logger = logging.getLogger(__name__)

_LOCK = ".run.lock"
_OWNER = ".run.json"
#: Seconds that the workers of a killed run may outlive it and hold its lock.
PATIENCE = 15.0

# The lock of each folder in this process, and who has taken it. A forked
# process holds nothing of its parent's: names begin with the process id.
_held: dict[tuple[int, str], tuple[filelock.BaseFileLock, set]] = {}


class FolderInUse(RuntimeError):
    """Another run uses the folder."""


class FolderLock:
    """Keeps other runs out of an output folder, which ``key`` names.

    One process can take it several times; the system releases it at its end.
    """

    def __init__(self, folder: str | Path, key: str):
        self.folder = Path(folder)
        self.key = key

    @property
    def _name(self) -> tuple[int, str]:
        return os.getpid(), os.path.realpath(self.folder)

    def acquire(self) -> None:
        """Takes the folder, or raises FolderInUse with who has it."""
        if self._name not in _held:
            _held[self._name] = (self._lock(), set())
        _held[self._name][1].add(self)

    def release(self) -> None:
        """Releases the folder, if this object holds it."""
        lock, users = _held.get(self._name, (None, set()))
        if self not in users:
            return
        users.remove(self)
        if users:
            return
        del _held[self._name]
        # While it is held, so that whoever comes now is refused; systems that
        # do not remove an open file keep an empty one.
        for name in (_OWNER, _LOCK):
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        lock.release()

    def _lock(self) -> filelock.BaseFileLock:
        lock = filelock.FileLock(self.folder / _LOCK)
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().isoformat(" ", "seconds"),
        }
        try:
            self._wait(lock)
            with contextlib.suppress(OSError):
                write_json(self.folder / _OWNER, owner)
        except (OSError, NotImplementedError) as error:
            # A file system without locks, a full disk.
            logger.warning(
                "%s: cannot be locked (%s); start no other run in it",
                self.folder,
                getattr(error, "strerror", None) or error,
            )
        return lock

    def _wait(self, lock: filelock.BaseFileLock) -> None:
        """Takes the lock now, or when the workers of a dead run have ended."""
        deadline = time.monotonic() + PATIENCE
        while True:
            # A Timeout is an OSError.
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=0)
                return
            pid, host, since = self._owner()
            dead = host == socket.gethostname() and not process_is_alive(pid)
            if not dead or time.monotonic() > deadline:
                who = f" (process {pid} on {host}, since {since})"
                raise FolderInUse(
                    f"{self.key}: another run{who if host else ''} works in "
                    f"{self.folder}; wait for its end, or give another folder"
                )
            time.sleep(0.2)

    def _owner(self) -> tuple[int, str, str]:
        """Process, host and start of who holds the lock; empty if unknown."""
        try:
            found = json.loads((self.folder / _OWNER).read_bytes())
            return int(found["pid"]), str(found["host"]), str(found["since"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, "", ""
