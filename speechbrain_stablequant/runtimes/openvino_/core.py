"""OpenVINO in a process: its ``Core``, and graphs compiled for this CPU, which
any number of threads may call."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import openvino as ov
import torch

from ...utils import forks
from ...utils.timing import PREPARATION
from ..cpu import in_half
from . import OpenVinoOptions

#: Entries of OpenVINO's cache of prepared shapes. A shape takes about 15, so
#: that the 67 lengths up to 30 s fit.
CACHE_CAPACITY = 2000


def core() -> ov.Core:
    """The ``Core`` of this process, kept until its end; a forked process has
    its own.

    OpenVINO's CPU plugin gives the thread that compiles first a stack for
    signal handlers, and restores the previous one when the ``Core`` goes, even
    if that was freed: with two cores the next signal (SIGINT) ends the process
    with SIGSEGV (seen with 2026.4).
    """
    return _core(os.getpid())


@functools.cache
def _core(process: int) -> ov.Core:
    made = ov.Core()
    forks.keep(made)
    return made


def output(
    request: ov.InferRequest, place: int = 0, frames: int | None = None
) -> torch.Tensor:
    """A copy of a graph's result, up to ``frames``; float32 if bfloat16."""
    found = request.get_output_tensor(place)
    data = found.data if frames is None else found.data[:, :frames]
    if found.element_type == ov.Type.bf16:  # which numpy lacks
        data = torch.from_numpy(data.view(np.int16).copy())
        return data.view(torch.bfloat16).float()
    return torch.from_numpy(data.copy())


def name_by_place(model: ov.Model) -> ov.Model:
    """Name operations by position: OpenVINO numbers them across the process,
    and its cache of compiled graphs depends on the names."""
    for place, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() != "Parameter":
            node.set_friendly_name(f"{node.get_type_name()}_{place}")
    return model


def _cores() -> int:
    """Number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CompiledGraph:
    """Settings, the compiled graph, and its requests.

    Each call has a request of its own. With ``threads``, as many calls run in
    parallel as the CPU has room for; otherwise one at a time by all threads.
    Compiled graphs in ``cache_folder`` are as large as the integer weights.
    """

    def __init__(self, options: OpenVinoOptions):
        forks.use_in_one_process("openvino")
        threads = options.threads
        self._half = in_half(options.precision)
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
        if options.cache_folder is not None:
            self.settings["CACHE_DIR"] = str(options.cache_folder)

    def compile(self, model: ov.Model, **settings: Any) -> None:
        """Compile the graph, with settings beside the usual ones."""
        self.settings |= settings
        with PREPARATION.running():
            self._compiled = core().compile_model(model, "CPU", self.settings)

    def __del__(self):
        if hasattr(self, "_compiled"):
            forks.keep_in_child(self._pid, self._compiled, *self._idle)

    def take(self) -> ov.InferRequest:
        """A request that no other call uses until it is given back."""
        forks.use_in_one_process("openvino")
        try:
            return self._idle.pop()
        except IndexError:
            return self._compiled.create_infer_request()

    def give_back(self, request: ov.InferRequest) -> None:
        self._idle.append(request)

    @contextmanager
    def _request(self) -> Iterator[ov.InferRequest]:
        request = self.take()
        yield request
        # Not after an error: its state is unknown then.
        self.give_back(request)
