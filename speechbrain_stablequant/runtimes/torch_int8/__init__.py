"""Integers on a CPU with torch alone, by its oneDNN operators; any length."""

from dataclasses import dataclass

from ...utils.typed import count
from ..base import Runtime


@dataclass(frozen=True)
class TorchInt8Options:
    """``backend: torch_int8``.

    Arguments
    ---------
    threads : int or None
        Threads of one call; None for torch's number.
    """

    threads: int | None = count(None)


RUNTIME = Runtime(
    TorchInt8Options,
    encoder="torch_int8.executor:TorchInt8Executor",
    layer_runner="torch_int8.layer_runner:TorchInt8Runner",
    device="cpu",
    streams=True,
    fork_safe=True,
)
