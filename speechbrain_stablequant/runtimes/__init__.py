"""Ways to execute a plan: which there are, which one runs here.

A runtime is one module with ``make_executor(spec, **options)`` for a whole
encoder and ``make_layer(layer)`` for a layer outside of it (a head), and one
line in ``RUNTIMES``. Its module is imported when it is used, so that nothing
optional is needed before.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..core.integer_layer import IntegerLayer
from ..model.encoder_spec import describe_encoder
from ..model.layers import Encoder, find_encoders
from ..utils import forks
from ..utils.files import code_identity
from ..utils.typed import one_line
from .base import encoder_forward, in_own_precision, modules_by_name
from .cpu import CpuClass, cpu_class, executed_integers
from .geometry import heads_with_algorithms, why_not, with_algorithms
from .options import AUTO
from .probe import OWN, SEVEN_BITS, Compute, Probe, ProbeError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Runtime:
    """One line of the table.

    Arguments
    ---------
    encoder : str or None
        ``"module:function"`` that makes an EncoderExecutor of an
        EncoderSpec, relative to this package; None: layer by layer.
    layer : str
        ``"module:function"`` that makes a LayerExecutor of an IntegerLayer.
    trial : str or None
        ``"module:function"`` that makes a LayerRunner of the executor's
        options, by which layers are compared with exact arithmetic; None for
        a runtime that is tried otherwise.
    layer_trial : str or None
        The same for layers outside of an encoder.
    device : str or None
        Type of the device that it runs on; None for any.
    needs : tuple of str
        Python packages that have to be there.
    install : str
        What to install if they are not.
    pair_sums : bool
        Whether it multiplies by CPU kernels that saturate sums of two
        products on a CPU without VNNI.
    streams : bool
        Whether it takes in layers whose weights are still in their file, and
        reads one after the other.
    fork_safe : bool
        Whether what was built in a process also computes in its forked
        children; otherwise a child builds its own.
    extras : frozenset of str
        What it can do beyond integers with one scale per output channel and
        inputs around zero: ``"asymmetric"`` (an activation offset),
        ``"weight_groups"``.
    """

    encoder: str | None
    layer: str
    trial: str | None = None
    layer_trial: str | None = None
    device: str | None = None
    needs: tuple[str, ...] = ()
    install: str = ""
    pair_sums: bool = False
    streams: bool = False
    fork_safe: bool = False
    extras: frozenset[str] = frozenset()


_OFFSETS = frozenset({"asymmetric"})
_TORCH_INT8_LAYER = "torch_int8.layer:make_layer"
_TORCH_INT8_TRIAL = "torch_int8.trial:make_runner"

RUNTIMES: dict[str, Runtime] = {
    "torch": Runtime(
        None,
        "simulated:make_layer",
        fork_safe=True,
        extras=_OFFSETS | {"weight_groups"},
    ),
    "torch_int8": Runtime(
        "torch_int8.executor:make_executor",
        _TORCH_INT8_LAYER,
        _TORCH_INT8_TRIAL,
        _TORCH_INT8_TRIAL,
        "cpu",
        pair_sums=True,
        streams=True,
        fork_safe=True,
        extras=_OFFSETS,
    ),
    "openvino": Runtime(
        "openvino_:make_executor",
        _TORCH_INT8_LAYER,
        "openvino_.trial:make_runner",
        _TORCH_INT8_TRIAL,
        "cpu",
        ("openvino",),
        "speechbrain_stablequant[cpu]",
        pair_sums=True,
        streams=True,
        extras=_OFFSETS,
    ),
    "onnx": Runtime(
        "onnx_.executor:make_executor",
        _TORCH_INT8_LAYER,
        "onnx_.trial:make_runner",
        _TORCH_INT8_TRIAL,
        "cpu",
        ("onnx", "onnxruntime"),
        "speechbrain_stablequant[onnx]",
        pair_sums=True,
        extras=_OFFSETS,
    ),
    "triton": Runtime(
        "triton:make_executor",
        "triton:make_layer",
        None,
        None,
        "cuda",
        ("triton",),
        "triton",
        extras=_OFFSETS,
    ),
}


def _missing(runtime: Runtime) -> list[str]:
    return [p for p in runtime.needs if importlib.util.find_spec(p) is None]


def _why_not(name: str, device: torch.device) -> str | None:
    """Why a runtime cannot run on a device, or None if it can."""
    runtime = RUNTIMES[name]
    missing = _missing(runtime)
    if missing:
        return (
            f"package '{missing[0]}' is not installed; run "
            f"pip install '{runtime.install}'"
        )
    if forks.used_before_fork(name):
        return f"it {forks.REASON}"
    if name == "triton" and device.type == "cuda" and torch.cuda.is_available():
        # without the triton package there would have been an answer above
        from .triton.executor import why_not

        reason = why_not(device)
        if reason is not None:
            return reason
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET")
    if runtime.device not in (None, device.type) and not interpreted:
        return (
            f"it runs on {runtime.device}, and the device is {device}; "
            "write backend: auto"
        )
    return _why_no_layer(runtime)


def _why_no_layer(runtime: Runtime) -> str | None:
    """Why a CPU runtime computes no layer here: it is tried, once."""
    if runtime.trial is None:
        return None
    try:
        reason = why_not(_load(runtime.trial)())
    # whatever a package raises that is installed and does not load
    except Exception as error:
        reason = f"it does not load ({one_line(error)})"
    return reason and f"{reason}; write backend: auto"


def candidates(backend: str, device: str | torch.device) -> list[str]:
    """The runtimes that may compute on a device.

    Arguments
    ---------
    backend : str
        A key of ``RUNTIMES``, or ``"auto"``.
    device : str or torch.device
        Where the model runs.

    Returns
    -------
    list of str
        Keys of ``RUNTIMES``, the first choice first: for ``"auto"`` triton on
        a CUDA device, openvino and torch_int8 on a CPU, whether they are
        there or not, and the simulation as the last resort; otherwise the one
        that was named.

    Raises
    ------
    ValueError
        An unknown name, or a named runtime that cannot run here.

    Example
    -------
    >>> candidates("torch", "cpu"), candidates("auto", "cpu")
    (['torch'], ['openvino', 'torch_int8', 'torch'])
    """
    device = torch.device(device)
    if backend == "auto":
        return [*AUTO.get(device.type, ()), "torch"]
    if backend not in RUNTIMES:
        raise ValueError(
            f"backend: '{backend}' is none of auto, {', '.join(RUNTIMES)}"
        )
    reason = _why_not(backend, device)
    if reason is not None:
        raise ValueError(f"backend: {backend} cannot run: {reason}")
    return [backend]


def first_right(
    names: Sequence[str],
    attempt: Callable[[str], Value],
    device: str | torch.device,
) -> tuple[Value, list[str]]:
    """The first of several runtimes that computes what it should.

    Arguments
    ---------
    names : sequence of str
        Of :func:`candidates`.
    attempt : callable
        Builds a runtime and lets it prove itself. Raises if it does not
        build, or computes something else; then the next one is tried, after
        one line. What the last one raises is raised.
    device : str or torch.device
        Where the model runs.

    Returns
    -------
    object
        What the attempt gave.
    list of str
        What is wrong with those that were tried before.

    Example
    -------
    >>> def attempt(name):
    ...     if name == "torch_int8":
    ...         raise ValueError("backend: torch_int8 is wrong; report it")
    ...     return name
    >>> first_right(["torch_int8", "torch"], attempt, "cpu")
    ('torch', ['torch_int8: is wrong'])
    """
    place = torch.device(device)
    absent: list[str] = []
    wrong: list[str] = []
    for name in names[:-1]:
        reason = _why_not(name, place)
        if reason is not None:
            absent.append(f"{name}: {reason}")
            continue
        try:
            return attempt(name), wrong
        except MemoryError:
            raise
        # Whatever a library raises on a machine that it does not know.
        except Exception as error:
            reason = _bare_reason(name, error)
        wrong.append(f"{name}: {reason}")
        logger.warning(
            "backend auto: %s is not used on device %s, and the next one is "
            "tried: %s",
            name,
            place,
            reason,
        )
    if len(names) > 1:
        warn_of_simulation(place, absent)
    return attempt(names[-1]), wrong


def _bare_reason(name: str, error: Exception) -> str:
    """An error in one line, without the name and what to do about it."""
    text = one_line(error, 400)
    for start in ("backend: ", "backend ", f"{name}: ", f"{name} "):
        text = text.removeprefix(start)
    return text.partition(";")[0]


def executed_form(backend: str, cpu: CpuClass | None = None) -> str:
    """Which weights a runtime executes.

    Arguments
    ---------
    backend : str
        A key of ``RUNTIMES``.
    cpu : CpuClass, optional
        The CPU; the present one by default.

    Returns
    -------
    str
        ``OWN`` or ``SEVEN_BITS`` of :mod:`.probe`.

    Example
    -------
    >>> executed_form("torch_int8", CpuClass("avx2")), executed_form("torch")
    ('seven', 'own')
    """
    exact = (cpu or cpu_class()).exact
    return OWN if exact or not RUNTIMES[backend].pair_sums else SEVEN_BITS


def prove(
    backend: str, probe: Probe, compute: Compute, device: torch.device
) -> None:
    """Raises unless a runtime answers a probe as it should.

    Arguments
    ---------
    backend : str
        A key of ``RUNTIMES``.
    probe : Probe
        The model's.
    compute : callable
        The model as the runtime computes it.
    device : torch.device
        Where it computes.

    Raises
    ------
    ProbeError
        Where it differs, by how much, and what is allowed.
    """
    form = executed_form(backend)
    difference = probe.difference(compute, form, torch.device(device))
    if difference is not None:
        raise ProbeError(
            f"backend: {backend} computes something else on this machine: "
            f"{difference}; write backend: auto"
        )


def choose_backend(
    backend: str, device: str | torch.device
) -> tuple[str, list[str]]:
    """The runtime for a device, and why it is not an integer one.

    Arguments
    ---------
    backend : str
        A key of ``RUNTIMES``, or ``"auto"``: the first of
        :func:`candidates`.
    device : str or torch.device
        Where the model runs.

    Returns
    -------
    str
        A key of ``RUNTIMES``.
    list of str
        Where ``"auto"`` found none: what is wrong with each.

    Raises
    ------
    ValueError
        An unknown name, or a runtime that cannot run here.

    Example
    -------
    >>> choose_backend("torch", "cpu")
    ('torch', [])
    """
    names, reasons = candidates(backend, device), []
    if backend != "auto":
        return backend, []
    device = torch.device(device)
    for name in names[:-1]:
        reason = _why_not(name, device)
        if reason is None:
            return name, []
        reasons.append(f"{name}: {reason}")
    warn_of_simulation(device, reasons)
    return "torch", reasons or [f"no integer runtime for device {device}"]


def warn_of_simulation(
    device: str | torch.device, reasons: Sequence[str]
) -> None:
    """Says that no integer runtime computes.

    Arguments
    ---------
    device : str or torch.device
        Where the model runs.
    reasons : sequence of str
        What is wrong with each.
    """
    logger.warning(
        "no integer runtime for device %s: quantization is simulated, "
        "which is slower than the float model%s",
        device,
        f" ({'; '.join(reasons)})" if reasons else "",
    )


def resolve_backend(backend: str, device: str | torch.device) -> str:
    """The runtime of :func:`choose_backend` alone.

    Arguments
    ---------
    backend, device
        As of :func:`choose_backend`.

    Returns
    -------
    str

    Example
    -------
    >>> resolve_backend("torch", "cpu")
    'torch'
    """
    return choose_backend(backend, device)[0]


@functools.cache
def code_digest() -> str:
    """Identifies the code that executes plans.

    Returns
    -------
    str
        32 hexadecimal digits.
    """
    return code_identity(Path(__file__).parent)


def _load(reference: str) -> Callable[..., Any]:
    module, _, function = reference.partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), function)


def _encoders(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> list[Encoder]:
    """Each encoder with an integer layer once, under the key that the layers
    are named by: a model may stand behind two keys."""
    chosen: dict[int, Encoder] = {}
    for key, module in modules.items():
        for encoder in find_encoders({key: module}):
            if any(name.startswith(encoder.path + ".") for name in integers):
                chosen.setdefault(id(encoder.model), encoder)
    return list(chosen.values())


def runtimes_with(extras: Iterable[str]) -> list[str]:
    """The runtimes that can do something more.

    Arguments
    ---------
    extras : iterable of str
        As of :class:`Runtime`.

    Returns
    -------
    list of str

    Example
    -------
    >>> runtimes_with(["weight_groups"])
    ['torch']
    """
    wanted = frozenset(extras)
    return [name for name, row in RUNTIMES.items() if wanted <= row.extras]


def check_extras(backend: str, extras: Iterable[str]) -> None:
    """Raises unless a runtime can do all that a plan needs.

    Arguments
    ---------
    backend : str
        A key of ``RUNTIMES``.
    extras : iterable of str
        As of :class:`Runtime`.

    Raises
    ------
    ValueError
        Names what it cannot do, and who can.

    Example
    -------
    >>> check_extras("triton", ["weight_groups"])
    Traceback (most recent call last):
    ValueError: backend: triton cannot execute a plan with weight_groups; \
write backend: torch, or leave that switch off
    """
    extras = frozenset(extras)
    missing = sorted(extras - RUNTIMES[backend].extras)
    if missing:
        raise ValueError(
            f"backend: {backend} cannot execute a plan with "
            f"{', '.join(missing)}; write backend: "
            f"{' or '.join(runtimes_with(extras))}, or leave that switch off"
        )


def build_forwards(
    backend: str,
    modules: Mapping[str, nn.Module],
    integers: Mapping[str, IntegerLayer],
    cpu: CpuClass | None = None,
    **options: Any,
) -> dict[nn.Module, Callable[..., Any]]:
    """The functions that take the place of the float model's forwards.

    Arguments
    ---------
    backend : str
        A key of ``RUNTIMES``.
    modules : Mapping
        The Brain's modules by key. Weights of integer layers are not read;
        they may be on the ``meta`` device.
    integers : Mapping
        Integer layers by name.
    cpu : CpuClass, optional
        The CPU whose integers are executed; the present one by default.
    **options
        Of the runtime's ``make_executor``.

    Returns
    -------
    dict
        Forward by module, for
        :func:`~speechbrain_stablequant.runtimes.base.shadowed_forwards`.

    Raises
    ------
    ValueError
        A layer that is not in the model, an encoder that the integer
        runtimes do not compute, or a layer that this runtime cannot execute;
        :class:`~speechbrain_stablequant.runtimes.geometry.UnusableRuntime` if
        it cannot on this machine only.

    Example
    -------
    >>> from speechbrain_stablequant.core.integer_layer import integer_layer
    >>> from speechbrain_stablequant.model.layers import find_layers
    >>> from speechbrain_stablequant.core.plan import LayerQuant
    >>> modules = {"lin": nn.Linear(4, 2)}
    >>> (layer,) = find_layers(modules, ["lin"])
    >>> integers = {"lin": integer_layer(layer, LayerQuant(8, 8, 1.0))}
    >>> forwards = build_forwards("torch", modules, integers)
    >>> forwards[modules["lin"]](torch.zeros(1, 4)).shape
    torch.Size([1, 2])
    """
    forks.protect_children()
    runtime = RUNTIMES[backend]
    check_extras(
        backend,
        frozenset().union(*(layer.extras for layer in integers.values())),
    )
    if runtime.pair_sums:
        integers = executed_integers(integers, cpu or cpu_class())
    if not runtime.streams:
        integers = {name: x.loaded() for name, x in integers.items()}
    by_name = modules_by_name(modules, integers)
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    inside: set[str] = set()
    if runtime.encoder is not None:
        make_executor = _load(runtime.encoder)
        for encoder in _encoders(modules, integers):
            spec = describe_encoder(encoder.model, encoder.path, integers)
            if runtime.trial is not None:
                runner = _load(runtime.trial)(**options)
                spec = with_algorithms(spec, runner)
            executor = make_executor(spec, **options)
            forwards[encoder.model] = encoder_forward(executor)
            inside.update(layer.name for layer in spec.layers())
    make_layer = _load(runtime.layer)
    heads = {n: x for n, x in integers.items() if n not in inside}
    if runtime.layer_trial is not None:
        heads = heads_with_algorithms(heads, _load(runtime.layer_trial)())
    for name, layer in heads.items():
        forwards[by_name[name]] = make_layer(layer)
    return {m: in_own_precision(f) for m, f in forwards.items()}
