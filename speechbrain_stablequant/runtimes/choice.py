"""Chooses the runtime for a device."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..utils import forks
from ..utils.typed import one_line
from . import layer_check
from .cpu import PAIR_SUM_BITS, cpu_class
from .registry import AUTO, find_runtime, load_function

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


def _why_not(name: str, device: torch.device) -> str | None:
    """Why a runtime cannot run on a device, or None if it can."""
    runtime = find_runtime(name)
    for package in runtime.needs:
        if importlib.util.find_spec(package) is None:
            return (
                f"package '{package}' is not installed; run "
                f"pip install '{runtime.install}'"
            )
    if forks.used_before_fork(name):
        return f"it {forks.REASON}"
    if runtime.device not in (None, device.type):
        return (
            f"it runs on {runtime.device}, and the device is {device}; "
            "write backend: auto"
        )
    try:
        if runtime.why_not is not None:
            return load_function(runtime.why_not)(device)
        if runtime.layer_runner is None:
            return None
        reason = layer_check.why_not(load_function(runtime.layer_runner)())
    # An installed package that does not load may raise anything.
    except Exception as error:
        reason = f"it does not load ({one_line(error)})"
    return reason and f"{reason}; write backend: auto"


def candidates(backend: str, device: str | torch.device) -> list[str]:
    """Runtimes to try on a device, in order of preference.

    For ``auto``: the integer runtimes of the device, available or not, then the
    simulation. Otherwise the named one; ValueError if it is unknown or cannot
    run here.
    """
    device = torch.device(device)
    if backend == "auto":
        return [*AUTO.get(device.type, ()), "torch"]
    reason = _why_not(backend, device)
    if reason is not None:
        raise ValueError(f"backend: {backend} cannot run: {reason}")
    return [backend]


def first_passing(
    names: Sequence[str],
    attempt: Callable[[str], Value],
    device: str | torch.device,
) -> tuple[Value, list[str]]:
    """Result of the first runtime whose ``attempt(name)`` does not raise, and
    the reasons why those before it failed.

    ``attempt`` builds a runtime and checks its probe. A failure is logged in
    one line; that of the last runtime is raised.
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
        # A library may raise anything on a machine that it does not know.
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
        _warn_of_simulation(place, absent)
    return attempt(names[-1]), wrong


def _bare_reason(name: str, error: Exception) -> str:
    """An error in one line, without the runtime's name and the advice."""
    text = one_line(error, 400)
    for start in ("backend: ", "backend ", f"{name}: ", f"{name} "):
        text = text.removeprefix(start)
    return text.partition(";")[0]


def choose_backend(
    backend: str, device: str | torch.device
) -> tuple[str, list[str]]:
    """The first of :func:`candidates` that can run. If only the simulation
    can, also why each of the others cannot."""
    names, reasons = candidates(backend, device), []
    for name in names[:-1]:
        reason = _why_not(name, torch.device(device))
        if reason is None:
            return name, []
        reasons.append(f"{name}: {reason}")
    if backend == "auto":
        _warn_of_simulation(device, reasons)
        reasons = reasons or [f"no integer runtime for device {device}"]
    return names[-1], reasons


def _warn_of_simulation(
    device: str | torch.device, reasons: Sequence[str]
) -> None:
    """Warn that no integer runtime is used, with the reason of each."""
    logger.warning(
        "no integer runtime for device %s: quantization is simulated, "
        "which is slower than the float model%s",
        device,
        f" ({'; '.join(reasons)})" if reasons else "",
    )


def seven_bits_notes(name: str, bits: int) -> list[str]:
    """Warn if a runtime executes weights with fewer bits than the plan's."""
    cpu = cpu_class()
    if cpu.exact or find_runtime(name).device != "cpu" or bits <= PAIR_SUM_BITS:
        return []
    return [
        f"This CPU (class {cpu.name}) has no VNNI: weights of {bits} bits "
        f"were executed with {PAIR_SUM_BITS}."
    ]
