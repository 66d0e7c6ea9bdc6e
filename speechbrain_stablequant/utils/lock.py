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

# The lock of each folder in this process, and its count.
_held: dict[tuple[int, str], list] = {}


class FolderInUse(RuntimeError):
    """Another run uses the folder."""


class FolderLock:
    """Keeps other runs out of an output folder while it is held.

    The system releases it when the process ends. One process can take it
    several times. ``key`` is the configuration key that named the folder.
    """

    def __init__(self, folder: str | Path, key: str):
        self.folder = Path(folder)
        self.key = key
        self._taken = 0

    @property
    def _name(self) -> tuple[int, str]:
        # A forked process holds nothing of its parent's.
        return os.getpid(), os.path.realpath(self.folder)

    def acquire(self) -> None:
        """Takes the folder, or raises FolderInUse with the process that has
        it."""
        if self._taken:
            return
        self._taken = os.getpid()
        if self._name in _held:
            _held[self._name][1] += 1
            return
        lock = filelock.FileLock(self.folder / _LOCK)
        try:
            self._wait(lock)
        except filelock.Timeout:
            self._taken = 0
            raise FolderInUse(self._in_use()) from None
        except (OSError, NotImplementedError) as error:
            # A file system without locks, a full disk.
            logger.warning(
                "%s: cannot be locked (%s); start no other run in it",
                self.folder,
                getattr(error, "strerror", None) or error,
            )
        else:
            owner = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now().isoformat(" ", "seconds"),
            }
            with contextlib.suppress(OSError):
                write_json(self.folder / _OWNER, owner)
        _held[self._name] = [lock, 1]

    def _wait(self, lock: filelock.BaseFileLock) -> None:
        """Takes the lock now, or when the workers of a dead run have ended."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                lock.acquire(timeout=0)
                return
            except filelock.Timeout:
                owner = self._owner()
                dead = owner.get("host") == socket.gethostname() and not (
                    process_is_alive(owner["pid"])
                )
                if not dead or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def release(self) -> None:
        """Releases the folder, if this object holds it."""
        mine, self._taken = self._taken == os.getpid(), 0
        if not mine or self._name not in _held:
            return
        row = _held[self._name]
        row[1] -= 1
        if row[1]:
            return
        del _held[self._name]
        # While it is held, so that whoever comes now is refused; systems that
        # do not remove an open file keep an empty one.
        for name in (_OWNER, _LOCK):
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        row[0].release()

    def _owner(self) -> dict:
        """Who holds the lock; empty if that cannot be read."""
        try:
            found = json.loads((self.folder / _OWNER).read_bytes())
            return {
                "pid": int(found["pid"]),
                "host": str(found["host"]),
                "since": str(found["since"]),
            }
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _in_use(self) -> str:
        owner = self._owner()
        who = "another run"
        if owner:
            who += (
                f" (process {owner['pid']} on {owner['host']}, since "
                f"{owner['since']})"
            )
        return (
            f"{self.key}: {who} works in {self.folder}; wait for its end, or "
            "give another folder"
        )
