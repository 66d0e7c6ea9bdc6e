"""Single layers in OpenVINO, for comparison with exact arithmetic."""

from typing import Any

import numpy as np
import openvino as ov
import torch

from ...core.encoder_spec import AnyLayer
from ...utils import forks
from ..algorithms import (
    CONVOLUTION,
    FLOAT,
    JOINED_GROUPS,
    NATIVE,
    WIDE_GROUP,
    WINDOW_PRODUCT,
)
from ..cpu import cpu_class
from ..geometry import Geometry
from ..trial import Results, Trial
from .core import core
from .graph import GraphBuilder
from .windows import flat_windows


class OpenVINORunner:
    """Computes layers as the executor's graph does."""

    name = "openvino"

    def __init__(self, precision: str = "auto", threads: int | None = None):
        cpu = cpu_class()
        self._half = precision == "bf16" or (precision == "auto" and cpu.bf16)
        self._narrow_groups_fail = cpu.name == "amx"
        self._threads = threads or torch.get_num_threads()
        forks.use_in_one_process(self.name)
        self.versions = {
            "openvino": ov.__version__,
            "precision": "bf16" if self._half else "f32",
        }

    def half(self, geometry: Geometry) -> bool:
        """See :class:`..layer_check.LayerRunner`."""
        return self._half

    def algorithms(self, geometry: Geometry) -> tuple[str, ...]:
        """See :class:`..layer_check.LayerRunner`.

        oneDNN's AMX kernels are wrong for convolutions with few channels per
        group and a long window (OpenVINO 2026.4): there the native algorithm is
        skipped.
        """
        integer = geometry.weight_bits > 0
        if geometry.place == "front":
            ways = (NATIVE, CONVOLUTION)
        elif geometry.place == "position":
            ways = (NATIVE, JOINED_GROUPS, WINDOW_PRODUCT)
            narrow = geometry.shape[1] < WIDE_GROUP
            if geometry.groups == 1:
                ways = (NATIVE, WINDOW_PRODUCT)
            elif narrow and self._narrow_groups_fail:
                ways = (JOINED_GROUPS, WINDOW_PRODUCT)
        else:
            ways = (NATIVE,)
        return (*ways, FLOAT) if integer else ways

    def run(self, geometry: Geometry, trial: Trial) -> Results:
        """See :class:`..layer_check.LayerRunner`."""
        request = self._compiled(geometry, trial.layer).create_infer_request()
        found = []
        for x, other in zip(trial.inputs, trial.others, strict=True):
            if geometry.place == "first":
                x = x[:, :, 0].unfold(1, geometry.shape[2], geometry.stride)
            given = {"x": x.contiguous().numpy()}
            if geometry.then == "sum":
                given["other"] = other.numpy()
            request.infer(given)
            out = request.get_output_tensor(0).data
            if self._half:  # numpy has no bfloat16
                out = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
                out = out.float()
            else:
                out = torch.from_numpy(out.copy())
            if geometry.place == "position":
                out = out[:, : x.shape[1]]
            found.append(out)
        return Results(found)

    def _compiled(self, geometry: Geometry, layer: AnyLayer) -> Any:
        builder = GraphBuilder(None)
        width = geometry.shape[1] * geometry.groups
        if geometry.place == "first":
            width = geometry.shape[2]
        x = builder.input("x", [-1, -1, width])
        least = -float("inf")
        if geometry.place == "first":
            y = builder.linear(x, flat_windows(layer))
        elif geometry.place == "front":
            y = builder.strided(x, layer, least)
        elif geometry.place == "position":
            y = builder.turn(builder.conv(builder.turn(x), layer))
        else:
            y = builder.linear(x, layer)
        if geometry.then == "gelu":
            y = builder.gelu(y)
        elif geometry.then == "sum":
            other = builder.input("other", [-1, -1, geometry.shape[0]])
            y = ov.opset13.add(other, y)
        if self._half:
            y = ov.opset13.convert(y, "bf16")
        model = ov.Model([ov.opset13.result(y)], builder.inputs, "layer")
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": self.versions["precision"],
        }
        return core().compile_model(model, "CPU", settings)


def make_runner(
    precision: str = "auto", threads: int | None = None, **options: Any
) -> OpenVINORunner:
    """The runner for these options; others do not change results."""
    return OpenVINORunner(precision, threads)
