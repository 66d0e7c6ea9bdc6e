"""Chooses the runtime for a device, and lets it prove itself by a probe."""

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..utils import forks
from ..utils.typed import one_line
from .cpu import CpuClass, cpu_class
from .layer_check import why_not
from .options import AUTO
from .probe import Probe, ProbeError
from .probe_networks import OWN, SEVEN_BITS, Compute
from .registry import RUNTIMES, Runtime, load_function

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


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
        reason = why_not(load_function(runtime.trial)())
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
