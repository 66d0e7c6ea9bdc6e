"""Options of the runtimes: the content of ``backend_options``.

Imports no runtime, so that a block is checked where none is installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

from ..utils.typed import typed, unknown_key

#: The integer runtimes that ``backend: auto`` chooses from, by device type,
#: the first one first.
AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("openvino", "torch_int8"),
    "cuda": ("triton",),
}


@dataclass(frozen=True)
class SimulatedOptions:
    """``backend: torch`` has no options."""


@dataclass(frozen=True)
class TorchInt8Options:
    """``backend: torch_int8``.

    Arguments
    ---------
    threads : int or None
        Threads; torch's number by default.
    """

    threads: int | None = field(default=None, metadata={"least": 1})


@dataclass(frozen=True)
class OpenVinoOptions:
    """``backend: openvino``.

    Arguments
    ---------
    threads : int or None
        Threads of one call; torch's number by default.
    cache_folder : str or None
        Where compiled graphs are kept.
    max_models : int or None
        Has no effect any more.
    precision : str
        Of everything but the integer products.
    """

    threads: int | None = field(default=None, metadata={"least": 1})
    cache_folder: str | None = None
    max_models: int | None = field(default=None, metadata={"least": 0})
    precision: Literal["auto", "bf16", "f32"] = "auto"


@dataclass(frozen=True)
class OnnxOptions:
    """``backend: onnx``.

    Arguments
    ---------
    threads : int or None
        Threads of an operator; torch's number by default.
    provider : str
        What computes.
    """

    threads: int | None = field(default=None, metadata={"least": 1})
    provider: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class TritonOptions:
    """``backend: triton``.

    Arguments
    ---------
    device : str or None
        Where it runs; by default the device that the model is on.
    dtype : str
        Of the residual stream and of the attention.
    max_graphs : int
        CUDA graphs to keep, one for each (batch, length) bucket; 0: none.
    tune : bool
        Whether tiles are measured when a shape is first met.
    cache : str or None
        JSON file of measured tiles; by default one for each card in the
        user's cache folder.
    """

    device: str | None = None
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    max_graphs: int = field(default=48, metadata={"least": 0})
    tune: bool = True
    cache: str | None = None


#: By the names of ``RUNTIMES``.
OPTIONS: dict[str, type] = {
    "torch": SimulatedOptions,
    "torch_int8": TorchInt8Options,
    "openvino": OpenVinoOptions,
    "onnx": OnnxOptions,
    "triton": TritonOptions,
}


def option_names(backend: str) -> list[str]:
    """Options of a backend; of all runtimes it may choose for ``auto``."""
    names = [f.name for kind in _kinds(backend) for f in fields(kind)]
    return list(dict.fromkeys(names))


def check_options(
    backend: str,
    options: Mapping[str, Any],
    where: str = "backend_options",
) -> dict[str, Any]:
    """Check names, types and values of a backend's options.

    Arguments
    ---------
    backend : str
        As of :func:`option_names`.
    options : Mapping
        The options by name.
    where : str
        Their place, for errors.

    Returns
    -------
    dict
        The same options.

    Raises
    ------
    ValueError
        Names the first wrong option.

    Example
    -------
    >>> check_options("auto", {"threads": 2, "dtype": "bfloat16"})
    {'threads': 2, 'dtype': 'bfloat16'}
    >>> check_options("openvino", {"thread": 2})
    Traceback (most recent call last):
    ValueError: backend_options.thread: unknown key; did you mean 'threads'?
    """
    rows = dict(typed(options, dict, where))
    known = option_names(backend)
    for name, value in rows.items():
        place = f"{where}.{name}"
        if not known:
            raise ValueError(f"{place}: backend {backend} has no options")
        if name not in known:
            raise ValueError(f"{place}: {unknown_key(name, known)}")
        for kind in _kinds(backend):
            _check_option(kind, name, value, place)
    return rows


def select_options(runtime: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the chosen runtime takes, without those of other
    runtimes that ``auto`` might have chosen."""
    names = option_names(runtime)
    return {name: v for name, v in options.items() if name in names}


def _kinds(backend: str) -> list[type]:
    if backend == "auto":
        return [OPTIONS[name] for names in AUTO.values() for name in names]
    if backend not in OPTIONS:
        raise ValueError(
            f"backend: '{backend}' is none of auto, {', '.join(OPTIONS)}"
        )
    return [OPTIONS[backend]]


def _check_option(kind: type, name: str, value: Any, place: str) -> None:
    for option in fields(kind):
        if option.name == name:
            typed(value, get_type_hints(kind)[name], place)
            least = option.metadata.get("least")
            if least is not None and value is not None and value < least:
                raise ValueError(
                    f"{place}: must be at least {least}, not {value}"
                )
