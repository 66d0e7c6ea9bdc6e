"""The runtime that modules compute with: built once, used by any thread."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..runtimes.choice import candidates, first_passing
from ..runtimes.registry import RUNTIMES
from ..utils import forks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltRuntime:
    """A runtime that was built, and the encoder that it needs, if any."""

    name: str
    device: torch.device
    forwards: Mapping[nn.Module, Callable[..., Any]]
    encoder: nn.Module | None = None
    pid: int = field(default_factory=os.getpid)

    def serves(self, device: torch.device) -> bool:
        """Whether it computes on a device, in this process."""
        return device == self.device and (
            self.pid == os.getpid() or RUNTIMES[self.name].fork_safe
        )


class RuntimeSlot:
    """Holds the runtime of a backend, built by the first caller.

    ``build`` makes and checks a runtime by name; ``install`` gets it, and None
    where the one before is no longer valid.
    """

    def __init__(
        self,
        backend: str,
        build: Callable[[str, torch.device], BuiltRuntime],
        install: Callable[[BuiltRuntime | None], None],
    ):
        self.backend = backend
        self.built: BuiltRuntime | None = None
        self._build = build
        self._install = install
        self._lock = forks.ProcessLock()
        self._pid = os.getpid()
        forks.protect_children()

    @property
    def name(self) -> str | None:
        """The runtime in use; None before the first batch."""
        return self.built and self.built.name

    def ready(self, device: torch.device) -> BuiltRuntime:
        """The runtime for a device, built unless there is one."""
        built = self.built
        if built is not None and built.serves(device) and not forks.in_child():
            return built
        if device.type == "cuda" and self._pid != os.getpid():
            raise RuntimeError(
                f"the model was on {device} before this process was forked; "
                "load the recognizer after the fork"
            )
        forks.keep_to_one_thread()
        if built is not None and built.serves(device):
            return built
        with self._lock:
            built = self.built
            if built is None or not built.serves(device):
                self._replace(built, device)
            return self.built

    def _replace(
        self, before: BuiltRuntime | None, device: torch.device
    ) -> None:
        self.built = None
        self._install(None)
        names = candidates(self.backend, device)
        built, _ = first_passing(
            names, lambda name: self._build(name, device), device
        )
        self._install(built)
        self.built = built
        if before is not None and forks.used_before_fork(before.name):
            logger.warning(
                "backend %s: %s %s; %s computes here",
                self.backend,
                before.name,
                forks.REASON,
                self.name,
            )
