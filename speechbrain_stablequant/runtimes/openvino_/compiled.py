"""A graph compiled for this CPU, which any number of threads may call."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openvino as ov
import torch

from ...utils import forks
from ...utils.timing import PREPARATION
from ..cpu import cpu_class
from .core import core

#: Entries of OpenVINO's cache of prepared shapes. A shape takes about 15, so
#: that the 86 lengths up to 30 s fit.
CACHE_CAPACITY = 2000


def _cores() -> int:
    """Number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_half(precision: str) -> bool:
    """Whether everything but the integer products is computed in bfloat16."""
    if precision == "auto":
        return cpu_class().bf16
    return precision == "bf16"


class CompiledGraph:
    """Settings, the compiled graph, and its requests.

    Each call has a request of its own. With ``threads``, as many calls run in
    parallel as the CPU has room for; otherwise one at a time by all threads.
    Compiled graphs in ``cache_folder`` are as large as the integer weights.
    """

    def __init__(
        self,
        threads: int | None = None,
        cache_folder: str | Path | None = None,
        precision: str = "auto",
    ):
        forks.use_in_one_process("openvino")
        self._half = in_half(precision)
        self._pid = os.getpid()
        # pop and append are atomic.
        self._idle: list[ov.InferRequest] = []
        self._compiled: ov.CompiledModel | None = None
        streams = max(_cores() // threads, 1) if threads else 1
        self.settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams
            * (threads or torch.get_num_threads()),
            "INFERENCE_PRECISION_HINT": "bf16" if self._half else "f32",
            "CPU_RUNTIME_CACHE_CAPACITY": CACHE_CAPACITY,
            # Two processes would be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        if cache_folder is not None:
            self.settings["CACHE_DIR"] = str(cache_folder)

    def compile(self, model: ov.Model) -> None:
        """Compile the graph."""
        with PREPARATION.running():
            self._compiled = core().compile_model(model, "CPU", self.settings)

    def __del__(self):
        if hasattr(self, "_compiled"):
            forks.keep_in_child(self._pid, self._compiled, *self._idle)

    @contextmanager
    def _request(self) -> Iterator[ov.InferRequest]:
        """A request that no other call uses meanwhile."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        yield request
        # Not after an error: its state is unknown then.
        self._idle.append(request)
