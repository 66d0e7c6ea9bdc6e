"""Identifies objects and code by their content, the same in each process.

Classes are described by name, functions by their code, everything else by its
values. Addresses, hooks and files are ignored.
"""

import functools
import hashlib
import json
import logging
import os
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping, Set
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from .files import file_digest, identity
from .store import Store
from .tensor_bytes import headed_digest

DEPTH = 8  #: nesting depth; deeper objects are described by their class
#: Attributes that name a model's origin, not its content.
_PLACES = {
    *("source", "save_path", "cache_dir"),
    *("name_or_path", "_name_or_path", "_commit_hash"),
}
_NESTED = object()
#: Of every module: hooks, modes, and tensors that are looked at by name.
_OF_MODULES = set(vars(nn.Module()))
#: Variables of a module that are described where a function names them.
_SETTINGS = (bool, int, float, str, tuple, list, dict, set, frozenset)
_FILE_DIGESTS = "file_digests.json"
#: Code below these folders is known by its version; that of this package
#: decides nothing that a recipe does.
_LIBRARIES = (
    *(sysconfig.get_paths()[x] for x in ("stdlib", "purelib", "platlib")),
    str(Path(__file__).resolve().parents[1]),
    "<frozen",
)
# Of other prefixes: a virtual environment may see those of the system.
_SITE_PACKAGES = re.compile(r"[\\/](site|dist)-packages[\\/]")


def digest(value: Any, known: Mapping[int, str] | None = None) -> str:
    """Identifies an object by its content, in 32 hexadecimal digits.

    ``known`` names objects, by ``id``, that are identified elsewhere.
    """
    return identity(_Describer(known or {})(value, DEPTH))


def structure_digest(modules: Mapping[str, nn.Module]) -> str:
    """Identifies classes, settings and forwards of modules, not weights."""
    rows = [
        (key, name, module)
        for key, top in modules.items()
        for name, module in top.named_modules()
    ]
    describe = _Describer({id(x): f"{key}.{name}" for key, name, x in rows})
    return identity(
        [[key, name, describe.settings(x, DEPTH)] for key, name, x in rows]
    )


def tensor_digest(*tensors: torch.Tensor) -> str:
    """Identifies tensors by dtype, shape and values."""
    return headed_digest((f"{x.dtype}:{tuple(x.shape)};", x) for x in tensors)


class Code:
    """The code of functions and of everything they call outside of libraries.

    Methods of ``owner`` are followed up to its base ``library``.
    """

    def __init__(
        self,
        functions: Iterable[Callable],
        owner: type | None = None,
        library: type | None = None,
    ):
        self._owner = owner
        self._library = library
        self._describe = _Describer({}, follow=False)
        self._rows: list = []
        self._seen: set[int] = set()
        #: All names in them, of attributes as of variables.
        self.names: set[str] = set()
        for function in functions:
            self._add(function)
        self.digest = identity(self._rows)  #: 32 hexadecimal digits

    def _add(self, function: Any) -> None:
        function = getattr(function, "__func__", function)
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, types.FunctionType):
            return
        if id(function) in self._seen or is_library(function):
            return
        self._seen.add(id(function))
        names = _names(function.__code__)
        self.names |= names
        cells = [_content(cell) for cell in function.__closure__ or ()]
        defaults = [function.__defaults__, function.__kwdefaults__]
        self._rows.append(
            [
                function.__qualname__,
                _code(function.__code__, function.__doc__),
                self._describe(defaults, 4),
                [self._describe(cell, 4) for cell in cells],
            ]
        )
        for cell in cells:
            self._add(cell)
        for name in sorted(names):
            self._follow(name, function.__globals__)

    def _follow(self, name: str, variables: Mapping[str, Any]) -> None:
        for kind in getattr(self._owner, "__mro__", ()):
            if kind is self._library:
                break
            if name in vars(kind):
                method = vars(kind)[name]
                self._add(getattr(method, "fget", method))
                break
        value = variables.get(name)
        if isinstance(value, type) and not is_library(value):
            for part in vars(value).values():
                self._add(part)
        elif isinstance(value, _SETTINGS):
            self._rows.append([name, self._describe(value, 4)])
        else:
            self._add(value)


def is_library(thing: Any) -> bool:
    """Whether the version of Python or a package identifies a thing."""
    code = getattr(thing, "__code__", None)
    # A class of functions has a descriptor there.
    if isinstance(code, types.CodeType):
        file = code.co_filename
    else:
        file = _file_of(getattr(thing, "__module__", None) or "")
    return (
        file is None
        or file.startswith(_LIBRARIES)
        or _SITE_PACKAGES.search(file) is not None
    )


@functools.cache
def _file_of(module: str) -> str | None:
    """Resolved file of a module; empty for the script that runs."""
    if module == "__main__":
        return ""
    file = getattr(sys.modules.get(module), "__file__", None)
    return None if file is None else str(Path(file).resolve())


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)  # getattr(self, "name")
    return found


def _code(code: types.CodeType, doc: str | None = None) -> list:
    """Instructions and constants, without line numbers and the docstring."""
    constants = [_constant(x) for x in code.co_consts if x != doc]
    return [code.co_code.hex(), constants, list(code.co_names)]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, tuple | frozenset):
        rows = [_constant(part) for part in value]
        # A set has another order in each process.
        return sorted(rows, key=repr) if isinstance(value, frozenset) else rows
    return repr(value)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


class _Describer:
    """Turns objects into JSON values."""

    def __init__(self, known: Mapping[int, str], follow: bool = True):
        self.known = known
        self.follow = follow
        self._open: set[int] = set()

    def __call__(self, value: Any, depth: int) -> Any:
        plain = _plain(value)
        if plain is not _NESTED:
            return plain
        if id(value) in self.known:
            return ["known", self.known[id(value)]]
        if id(value) in self._open or depth == 0:
            return ["a", _name(type(value))]
        self._open.add(id(value))
        try:
            return self._nested(value, depth - 1)
        finally:
            self._open.remove(id(value))

    def _nested(self, value: Any, depth: int) -> Any:
        if isinstance(value, torch.Tensor):
            return ["tensor", tensor_digest(value)]
        if isinstance(value, np.ndarray) and value.dtype != object:
            return ["array", tensor_digest(torch.from_numpy(value.copy()))]
        if isinstance(value, nn.Module):
            return self._module(value, depth)
        if isinstance(value, Mapping):
            return ["mapping", _name(type(value)), self._rows(value, depth)]
        if isinstance(value, list | tuple):
            return [self(part, depth) for part in value]
        if isinstance(value, Set):
            rows = [self(part, depth) for part in value]
            return ["set", sorted(rows, key=json.dumps)]
        if isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
            return ["partial", [self(part, depth) for part in parts]]
        if isinstance(value, types.MethodType):
            return ["method", self(value.__func__, depth)]
        if callable(value) and hasattr(value, "__code__"):
            own = self.follow and not is_library(value)
            code = Code([value]).digest if own else None
            return ["function", _name(value), code]
        return self._object(value, depth)

    def _rows(self, items: Mapping, depth: int) -> list:
        rows = [[self(k, depth), self(v, depth)] for k, v in items.items()]
        return sorted(rows, key=json.dumps)

    def _module(self, module: nn.Module, depth: int) -> list:
        return [
            "module",
            [
                [name, self.settings(child, depth)]
                for name, child in module.named_modules()
            ],
            [
                [name, tensor_digest(tensor)]
                for name, tensor in module.state_dict().items()
                if isinstance(tensor, torch.Tensor)
            ],
        ]

    def settings(self, module: nn.Module, depth: int) -> list:
        """Describes a module without its tensors and children."""
        own = {
            name: value
            for name, value in vars(module).items()
            if name not in _OF_MODULES | _PLACES | {"forward"}
            and not isinstance(value, nn.Module)
        }
        kind = type(module)
        code = None
        if not is_library(kind):
            code = Code([kind.forward], kind, nn.Module).digest
        return [_name(kind), code, self._rows(own, depth)]

    def _object(self, value: Any, depth: int) -> list:
        kind = _name(type(value))
        # Tokenizers whose state is not Python's: sentencepiece, tokenizers.
        for name in ("serialized_model_proto", "to_str"):
            method = getattr(type(value), name, None)
            if callable(method):
                return ["an", kind, self(method(value), depth)]
        if isinstance(value, logging.Logger):
            return ["a", kind]
        own = {k: v for k, v in _state(value).items() if k not in _PLACES}
        return ["an", kind, self._rows(own, depth)]


def _plain(value: Any) -> Any:
    """Returns a plain value as JSON; ``_NESTED`` for everything else."""
    if isinstance(value, Enum):
        return ["enum", _name(type(value)), value.name]
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, bool | int | float | complex | np.generic):
        return [type(value).__name__, repr(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    if isinstance(value, str | PurePath | torch.dtype):
        return str(value)
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
        return ["name", _name(value)]
    return _NESTED


def _state(value: Any) -> dict[str, Any]:
    """Returns the attributes of an object, slots included."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _name(thing: Any) -> str:
    module = getattr(thing, "__module__", "")
    # A recipe's module has another name when another script imports it.
    module = "" if module == "__main__" or not is_library(thing) else module
    name = getattr(thing, "__qualname__", getattr(thing, "__name__", ""))
    return f"{module}.{name}"


class FileDigests:
    """Identifies files by content, remembered by path, size and time."""

    def __init__(self, store: Store):
        self.store = store
        known = store.read(_FILE_DIGESTS, _FILE_DIGESTS, "digests of files")
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
            self.store.write(_FILE_DIGESTS, _FILE_DIGESTS, self._known)
