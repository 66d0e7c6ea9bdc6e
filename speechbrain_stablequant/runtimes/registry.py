"""The registry of runtimes, and the check of their options.

To add a runtime, write a package with a ``RUNTIME`` (see :class:`.base.Runtime`
for what it names: a dataclass of options, an executor, a runner of single
layers that are checked on each machine) and a line in ``RUNTIMES``, and one in
``AUTO`` if ``backend: auto`` may choose it. The executor's arguments are the
options. A runtime that needs a package gets an extra in setup.cfg.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..utils.files import code_identity
from ..utils.typed import typed, unknown_key
from . import onnx_, openvino_, torch_int8, triton
from .base import Runtime

RUNTIMES: dict[str, Runtime] = {
    "torch": Runtime(
        layer="simulated:make_layer", simulates=True, fork_safe=True
    ),
    "torch_int8": torch_int8.RUNTIME,
    "openvino": openvino_.RUNTIME,
    "onnx": onnx_.RUNTIME,
    "triton": triton.RUNTIME,
}

#: The integer runtimes that ``backend: auto`` chooses from, by device type,
#: the first one first.
AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("openvino", "torch_int8"),
    "cuda": ("triton",),
}


def load_function(reference: str) -> Callable[..., Any]:
    """The function or class of a reference in a :class:`.base.Runtime`."""
    module, _, function = reference.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)


def find_runtime(backend: str) -> Runtime:
    """The runtime of a name; ValueError for an unknown one."""
    if backend not in RUNTIMES:
        raise ValueError(
            f"backend: '{backend}' is none of auto, {', '.join(RUNTIMES)}"
        )
    return RUNTIMES[backend]


def option_names(backend: str) -> list[str]:
    """Options of a backend; of all runtimes it may choose for ``auto``."""
    names = [f.name for kind in _kinds(backend) for f in fields(kind)]
    return list(dict.fromkeys(names))


def check_options(backend: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A backend's ``backend_options``, after a check of their names, types and
    values.

    Example
    -------
    >>> check_options("auto", {"threads": 2, "dtype": "bfloat16"})
    {'threads': 2, 'dtype': 'bfloat16'}
    >>> check_options("openvino", {"thread": 2})
    Traceback (most recent call last):
    ValueError: backend_options.thread: unknown key; did you mean 'threads'?
    """
    rows = dict(typed(options, dict, "backend_options"))
    known = option_names(backend)
    for name in rows:
        if name not in known:
            reason = unknown_key(name, known)
            raise ValueError(
                f"backend_options.{name}: "
                f"{reason if known else f'backend {backend} has no options'}"
            )
    for kind in _kinds(backend):
        names = {f.name for f in fields(kind)}
        own = {name: value for name, value in rows.items() if name in names}
        typed(own, kind, "backend_options")
    return rows


def select_options(runtime: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the chosen runtime takes, without those of other
    runtimes that ``auto`` might have chosen."""
    names = option_names(runtime)
    return {name: v for name, v in options.items() if name in names}


def _kinds(backend: str) -> list[type]:
    if backend == "auto":
        return [RUNTIMES[n].options for names in AUTO.values() for n in names]
    return [find_runtime(backend).options]


@functools.cache
def code_digest() -> str:
    """Digest of the code that executes plans, 32 hexadecimal digits."""
    return code_identity(Path(__file__).parent)
