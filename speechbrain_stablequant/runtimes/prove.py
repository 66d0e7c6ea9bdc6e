"""Lets a runtime prove itself by the probe of a folder or of a run."""

import torch

from .cpu import CpuClass, cpu_class
from .probe import Probe, ProbeError
from .probe_networks import OWN, SEVEN_BITS, Compute
from .registry import RUNTIMES


def executed_form(backend: str, cpu: CpuClass | None = None) -> str:
    """Which weights a runtime executes: ``OWN`` or ``SEVEN_BITS``."""
    exact = (cpu or cpu_class()).exact
    return OWN if exact or RUNTIMES[backend].device != "cpu" else SEVEN_BITS


def prove(
    backend: str, probe: Probe, compute: Compute, device: torch.device
) -> None:
    """Raise :class:`ProbeError` unless a runtime answers a probe correctly."""
    difference = probe.difference(compute, executed_form(backend), device)
    if difference is not None:
        raise ProbeError(
            f"backend: {backend} computes something else on this machine: "
            f"{difference}; write backend: auto"
        )
