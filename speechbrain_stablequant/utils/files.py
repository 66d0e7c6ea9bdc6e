"""Files that are either whole or not there, and errors that name them.

A run can be killed at any moment. Everything it leaves behind is written to
a temporary name in the same folder first and renamed when it is complete, so
that a reader never meets half a file.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import socket
import stat
import time
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .typed import one_line, short

# Levels of lists and objects in a JSON file.
_MAX_DEPTH = 64
_NUMBERS = (int, float)

# Of this process, in the names of temporary files: its machine, its number
# there, and what tells it from an earlier process with the same number.
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_TOKEN = secrets.token_hex(3)
_TEMPORARY = re.compile(
    r"\..+?\.(?:([0-9a-f]{6})-([0-9]+)-([0-9a-f]{6})\.)?[0-9a-f]{8}\.tmp"
)
#: Seconds after which a temporary file is nobody's, whoever made it.
_STALE_AFTER = 24 * 3600


def write_atomic(
    path: str | Path, data: str | bytes, mode: int = 0o666
) -> Path:
    """Writes a file in one step: the old content or the new, never a part.

    Arguments
    ---------
    path : str or Path
        The file. Its folder must exist.
    data : str or bytes
        The content. Text is written as UTF-8, line ends as they are.
    mode : int
        Permissions of the file, of which the umask takes away.

    Returns
    -------
    Path
        The file that was written.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> write_atomic(folder / "note.txt", "whole").read_text()
    'whole'
    >>> [file.name for file in folder.iterdir()]
    ['note.txt']
    """
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    # Not mkstemp: it makes files that only their owner may read, and a
    # report in a shared folder should follow the umask like any other file.
    temporary = _temporary(path)
    try:
        with open(
            temporary, "xb", opener=lambda name, how: os.open(name, how, mode)
        ) as file:
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


def _temporary(path: Path) -> Path:
    """A new hidden name beside a file, which says whose it is."""
    owner = f"{_HOST}-{os.getpid()}-{_TOKEN}"
    return path.with_name(f".{path.name}.{owner}.{secrets.token_hex(4)}.tmp")


def remove_stale(folder: str | Path) -> None:
    """Removes temporary files that killed processes have left in a folder.

    Those of live processes of this machine stay, and for a day those of
    other machines.

    Arguments
    ---------
    folder : str or Path
        The folder; it need not exist.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / ".plan.json.0123abcd.tmp").write_text("half a pl")
    >>> os.utime(folder / ".plan.json.0123abcd.tmp", (0, 0))
    >>> remove_stale(folder)
    >>> list(folder.iterdir())
    []
    """
    # What cannot be listed or removed is in nobody's way.
    with contextlib.suppress(OSError):
        for path in Path(folder).iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            with contextlib.suppress(OSError):
                if match and _is_stale(path, *match.groups()):
                    path.unlink()


def _is_stale(
    path: Path, host: str | None, pid: str | None, token: str | None
) -> bool:
    if time.time() - path.stat().st_mtime > _STALE_AFTER:
        return True
    if host != _HOST:
        return False
    if int(pid) == os.getpid():
        return token != _TOKEN
    return not process_is_alive(int(pid))


def process_is_alive(pid: int) -> bool:
    """Whether a process of this machine runs, as far as that can be known.

    Arguments
    ---------
    pid : int
        Its number.

    Returns
    -------
    bool
        True where the system does not tell.

    Example
    -------
    >>> process_is_alive(os.getpid())
    True
    """
    if os.name != "posix":
        return True  # there os.kill is no question
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def json_text(obj: Any, name: str) -> str:
    r"""An object as strict JSON.

    Arguments
    ---------
    obj : Any
        Dictionaries, lists, strings, numbers, booleans and None.
    name : str
        Of the file that it is for: opens the error.

    Returns
    -------
    str
        Ends with a line feed.

    Raises
    ------
    ValueError
        Says where something is that JSON cannot hold.

    Example
    -------
    >>> json_text([1], "sizes.json")
    '[\n 1\n]\n'
    """
    try:
        text = json.dumps(obj, indent=1, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        place = _unstorable(obj, "") or str(error)
        raise ValueError(f"{name}: cannot store {place} as JSON") from None
    return text + "\n"


def write_json(path: str | Path, obj: Any) -> Path:
    r"""Writes an object as strict JSON, atomically.

    Keys keep their order. NaN and infinity have no JSON form and are refused.

    Arguments
    ---------
    path : str or Path
        The file. Its folder must exist.
    obj : Any
        Dictionaries, lists, strings, numbers, booleans and None.

    Returns
    -------
    Path
        The file that was written.

    Example
    -------
    >>> file = getfixture("tmp_path") / "sizes.json"
    >>> write_json(file, {"float": 1.5}).read_text()
    '{\n "float": 1.5\n}\n'
    >>> write_json(file, {"units": [{"wer": float("nan")}]})
    Traceback (most recent call last):
    ValueError: sizes.json: cannot store nan at 'units[0].wer' as JSON
    """
    path = Path(path)
    return write_atomic(path, json_text(obj, path.name))


def identity(content: Any) -> str:
    """Identifies what something was made from.

    Arguments
    ---------
    content : Any
        Dictionaries, lists, strings, numbers, booleans and None.

    Returns
    -------
    str
        32 hexadecimal digits of a SHA-256; the order of keys does not count.

    Example
    -------
    >>> identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def code_identity(*folders: Path) -> str:
    """Identifies the Python files below some folders of this package.

    Arguments
    ---------
    *folders : Path
        The folders.

    Returns
    -------
    str
        32 hexadecimal digits of a SHA-256.

    Example
    -------
    >>> len(code_identity(Path(__file__).parent / "kernels"))
    32
    """
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def read_json(path: str | Path, what: str) -> Any:
    """Reads a JSON file, with an error that says which file and what it was.

    Arguments
    ---------
    path : str or Path
        The file.
    what : str
        What the file is to the user, such as ``"plan"``: opens the error.

    Returns
    -------
    Any
        The content.

    Example
    -------
    >>> file = write_json(getfixture("tmp_path") / "plan.json", {"bits": 8})
    >>> read_json(file, "plan")
    {'bits': 8}
    """
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
    raise ValueError(f"{what}: cannot read '{path}': {reason}")


def check_writable_folder(path: str | Path, key: str) -> Path:
    """Creates a folder and proves, by writing, that files can be put in it.

    Meant for the start of a run: a long search must not end with an output
    folder that refuses its result.

    Arguments
    ---------
    path : str or Path
        The folder.
    key : str
        The configuration key that named it: opens the error.

    Returns
    -------
    Path
        The folder.

    Example
    -------
    >>> folder = getfixture("tmp_path") / "quantized"
    >>> check_writable_folder(folder, "output_folder").is_dir()
    True
    """
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
    except OSError as error:
        obstacle = _file_on_the_way(folder)
        reason = (
            f"'{obstacle}' is a file"
            if obstacle is not None
            else error.strerror or str(error)
        )
    except ValueError as error:  # such as a null byte in the name
        reason = str(error)
    else:
        return folder
    raise ValueError(
        f"{key}: cannot write into the folder {str(folder)!r} ({reason}); "
        f"give another folder"
    )


def _file_on_the_way(folder: Path) -> Path | None:
    """The first component of a path that exists and is not a folder."""
    for part in (*reversed(folder.parents), folder):
        # lexists: a link that leads nowhere stands in the way as well
        if os.path.lexists(part) and not part.is_dir():
            return part
    return None


def read_file(path: str | Path) -> bytes:
    """The content of a regular file.

    A pipe or a device would be read for ever.

    Arguments
    ---------
    path : str or Path
        The file, or a link to one.

    Returns
    -------
    bytes

    Raises
    ------
    OSError
        There is no such file, or it is something else.

    Example
    -------
    >>> read_file(getfixture("tmp_path"))
    Traceback (most recent call last):
    OSError: [Errno 22] is a folder: ...
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # such as a null byte in the name
        raise OSError(errno.EINVAL, one_line(error), str(path)) from error
    if not stat.S_ISREG(mode):
        kind = "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
        raise OSError(errno.EINVAL, kind, str(path))
    return Path(path).read_bytes()


def plain_name(name: Any) -> str:
    """A file's name that cannot lead out of its folder.

    Arguments
    ---------
    name : Any
        As it stands in a file.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        It is something else.

    Example
    -------
    >>> plain_name("../plan.json")
    Traceback (most recent call last):
    ValueError: '../plan.json' is not the plain name of a file in this folder
    """
    good = isinstance(name, str) and name not in ("", ".", "..")
    if not (good and name.isprintable() and len(name) <= 255) or any(
        path(name).name != name for path in (PurePosixPath, PureWindowsPath)
    ):
        raise ValueError(
            f"{short(name)} is not the plain name of a file in this folder"
        )
    return name


def parse_json(text: str | bytes) -> Any:
    """Reads strict JSON.

    Arguments
    ---------
    text : str or bytes
        The JSON.

    Returns
    -------
    Any
        The content: of moderate depth, with finite numbers, and with text
        that can be written again.

    Raises
    ------
    ValueError
        It is something else.

    Example
    -------
    >>> parse_json("[1e999]")
    Traceback (most recent call last):
    ValueError: 1e999 is not a finite number
    """
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
    """Refuses what Python reads but JSON does not have: NaN and infinity."""
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is not a finite number")
    return number


def _check_content(content: Any) -> None:
    """Refuses depth that other functions cannot follow, and half characters,
    which cannot be written."""
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


def _unstorable(obj: Any, place: str) -> str | None:
    """Names the first value that JSON cannot hold, and where it is."""
    if isinstance(obj, dict):
        items = [
            (f"{place}.{key}" if place else str(key), value)
            for key, value in obj.items()
        ]
    elif isinstance(obj, (list, tuple)):
        items = [(f"{place}[{i}]", value) for i, value in enumerate(obj)]
    elif isinstance(obj, float) and not math.isfinite(obj):
        return f"{obj} at '{place}'"
    elif obj is None or isinstance(obj, (str, int, float)):
        return None
    else:
        return f"a {type(obj).__name__} at '{place}'"
    found = (_unstorable(value, where) for where, value in items)
    return next((bad for bad in found if bad is not None), None)
