"""Integers on a CPU with torch alone, by its oneDNN operators; any length."""

from dataclasses import dataclass

from ..base import Options, Runtime, option


@dataclass(frozen=True)
class TorchInt8Options(Options):
    """``backend: torch_int8``."""

    #: torch's number by default.
    threads: int | None = option(None, least=1)


RUNTIME = Runtime(
    TorchInt8Options,
    encoder="torch_int8.executor:TorchInt8Executor",
    layer_runner="torch_int8.layer_runner:TorchInt8Runner",
    device="cpu",
    streams=True,
    fork_safe=True,
)
