"""Files that are complete or absent, and errors that name them."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .typed import inside, one_line, short

logger = logging.getLogger(__name__)

# Levels of lists and objects in a JSON file.
_MAX_DEPTH = 64
_NUMBERS = (int, float)

# Owner in the names of temporary files: place, process id, and a token that
# distinguishes earlier processes with the same id.
_TOKEN = secrets.token_hex(3)
_TEMPORARY = re.compile(
    r"\..+?\.(?:([0-9a-f]{6})-([0-9]+)-([0-9a-f]{6})\.)?[0-9a-f]{8}\.tmp"
)
_STALE_AFTER = 24 * 3600  #: seconds after which any temporary file is stale
_OTHERS = stat.S_IWGRP | stat.S_IWOTH  # write permissions of other users


def write_atomic(
    path: str | Path, data: str | bytes, mode: int = 0o666
) -> Path:
    """Writes a file in one step: the old content or the new, never a part."""
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    temporary = _temporary(path)

    # Unlike mkstemp's, the file's permissions follow the umask.
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    try:
        with open(temporary, "xb", opener=opener) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        # The system's message names the temporary file; ours names the file.
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"cannot write the file: {reason}", str(path)
        ) from error
    return path


def process_place() -> str:
    """The host and the namespace that a process id belongs to."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace}"


def _place() -> str:
    return hashlib.sha256(process_place().encode()).hexdigest()[:6]


def _temporary(path: Path) -> Path:
    """Returns a new hidden name beside a file, which tells the process."""
    owner = f"{_place()}-{os.getpid()}-{_TOKEN}"
    return path.with_name(f".{path.name}.{owner}.{secrets.token_hex(4)}.tmp")


def remove_stale(folder: str | Path) -> None:
    """Removes killed processes' files; other machines' after a day."""
    # Files that cannot be removed do no harm.
    with contextlib.suppress(OSError):
        for path in Path(folder).iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            with contextlib.suppress(OSError):
                if match and _is_stale(path, *match.groups()):
                    path.unlink()


def _is_stale(
    path: Path, place: str | None, pid: str | None, token: str | None
) -> bool:
    if time.time() - path.stat().st_mtime > _STALE_AFTER:
        return True
    if place != _place():
        return False
    if int(pid) == os.getpid():
        return token != _TOKEN
    return not process_is_alive(int(pid))


def process_is_alive(pid: int) -> bool:
    """Whether a process of this machine runs, as far as the system tells."""
    if os.name == "posix":  # elsewhere os.kill is no question
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:
            pass
    return True


def json_text(obj: Any, name: str) -> str:
    """Returns an object as strict JSON; ``name`` opens the error."""
    try:
        text = json.dumps(obj, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        reason = next(_not_finite(obj, ""), error)
        raise ValueError(f"{name}: cannot be JSON ({reason})") from error
    return text + "\n"


def _not_finite(obj: Any, place: str) -> Iterator[str]:
    """Yields the numbers that JSON does not have, with their places."""
    if isinstance(obj, float) and not math.isfinite(obj):
        yield f"{obj} at '{place}'" if place else str(obj)
    items = obj.items() if isinstance(obj, dict) else ()
    if isinstance(obj, list | tuple):
        items = enumerate(obj)
    for key, value in items:
        yield from _not_finite(value, inside(place, key))


def write_json(path: str | Path, obj: Any) -> Path:
    """Writes strict JSON, without NaN and infinity, atomically."""
    path = Path(path)
    return write_atomic(path, json_text(obj, path.name))


def json_digest(content: Any) -> str:
    """Returns the SHA-256 of JSON data, whose keys have any order."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def identity(content: Any) -> str:
    """Identifies JSON data in 32 digits."""
    return json_digest(content)[:32]


def file_digest(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def code_identity(*folders: Path) -> str:
    """Identifies the Python files below some folders, in 32 digits."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def read_json(path: str | Path, what: str) -> Any:
    """Reads a JSON file; ``what`` names it to the user in errors."""
    path = Path(path)
    try:
        text = read_file(path).decode("utf-8")
        return parse_json(text)
    except FileNotFoundError:
        reason = "there is no such file"
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except ValueError as error:
        reason = f"it is not valid JSON ({one_line(error)})"
    raise ValueError(f"cannot read the {what} '{path.absolute()}': {reason}")


def check_writable_folder(path: str | Path, key: str) -> Path:
    """Creates the folder that a configuration key names, and writes to it."""
    if not str(path):
        raise ValueError(f"{key}: the folder's name is empty; give a folder")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary(folder / "probe")
        try:
            probe.write_bytes(b"1")
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        # A ValueError: such as a null byte in the name.
        reason = getattr(error, "strerror", None) or error
        for part in (*reversed(folder.parents), folder):
            # A link that leads nowhere is in the way as well.
            if os.path.lexists(part) and not os.path.isdir(part):
                reason = f"'{part}' is no folder"
        raise ValueError(
            f"{key}: cannot write into the folder {str(folder)!r} ({reason}); "
            "give another folder"
        ) from error
    return folder


def read_file(path: str | Path, private: bool = False) -> bytes:
    """Returns the content of a regular file, of this user if ``private``."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # such as a null byte in the name
        raise OSError(errno.EINVAL, one_line(error), str(path)) from error
    if not stat.S_ISREG(mode):
        kind = "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
        raise OSError(errno.EINVAL, kind, str(path))
    with open(path, "rb") as file:
        # The file that is read, not its name.
        if private and not _only_own(os.fstat(file.fileno())):
            reason = "another user owns it or may write it"
            raise OSError(errno.EACCES, reason, str(path))
        return file.read()


def _owned(state: os.stat_result) -> bool:
    """Whether this user owns a file, where the system tells."""
    return os.name != "posix" or state.st_uid == os.geteuid()


def _only_own(state: os.stat_result) -> bool:
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


def plain_name(name: Any) -> str:
    """Returns a file name after checking that it cannot leave its folder."""
    good = isinstance(name, str) and name not in ("", ".", "..")
    if not (good and name.isprintable() and len(name) <= 255) or any(
        path(name).name != name for path in (PurePosixPath, PureWindowsPath)
    ):
        raise ValueError(
            f"{short(name)} is not the plain name of a file in this folder"
        )
    return name


def parse_json(text: str | bytes) -> Any:
    """Parses strict JSON of moderate depth: finite numbers, valid text."""
    try:
        content = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite
        )
        _check_content(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error}") from error
    return content


def _refuse_constant(name: str) -> None:
    """Refuses NaN and infinity, which Python reads but JSON does not have."""
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is not a finite number")
    return number


def _check_content(content: Any) -> None:
    """Refuses deep nesting, and lone surrogates, which cannot be written."""
    level, depth = [content], 0
    while level:
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        depth += 1
        following: list[Any] = []
        for value in level:
            if type(value) is dict:
                following += value
                following += value.values()
            elif type(value) is list:
                following += [v for v in value if type(v) not in _NUMBERS]
            elif type(value) is str and not value.isascii():
                value.encode()
        level = following


class Outputs:
    """Records which files could not be written, so that the run continues."""

    def __init__(self) -> None:
        self._failed: dict[str, str] = {}

    @contextlib.contextmanager
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
