"""The single ``openvino.Core`` of a process, and the results of its graphs."""

import functools
import os

import numpy as np
import openvino as ov
import torch

from ...utils import forks


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
    request: ov.InferRequest, half: bool, frames: int | None = None
) -> torch.Tensor:
    """A copy, in float32, of the result of a graph whose output is bfloat16 if
    ``half``; its first ``frames``."""
    data = request.get_output_tensor(0).data[:, :frames]
    if half:  # numpy has no bfloat16
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
