"""Single layers in OpenVINO, for comparison with exact arithmetic."""

from typing import Any

import openvino as ov
import torch
from openvino import opset13 as op

from ...core.integer_layer import AnyLayer
from ...utils import forks
from ..cpu import cpu_class, in_half
from ..geometry import (
    CONVOLUTION,
    FLOAT,
    JOINED_GROUPS,
    NATIVE,
    WINDOW_PRODUCT,
    Geometry,
)
from ..trial_layer import Results, Trial
from . import OpenVinoOptions
from .core import core, output
from .graph import GraphBuilder


class OpenVINORunner:
    """Computes layers as the executor's graph does."""

    name = "openvino"

    def __init__(self, **options: Any):
        chosen, cpu = OpenVinoOptions(**options), cpu_class()
        self._half = in_half(chosen.precision)
        self._narrow_groups_fail = cpu.name == "amx"
        self._convolve = not cpu.exact
        self._threads = chosen.threads or torch.get_num_threads()
        forks.use_in_one_process(self.name)
        precision = "bf16" if self._half else "f32"
        self.versions = {"openvino": ov.__version__, "precision": precision}

    def half(self, geometry: Geometry) -> bool:
        return self._half

    def algorithms(self, geometry: Geometry) -> tuple[str, ...]:
        """oneDNN's AMX kernels are wrong for convolutions with few channels per
        group and a long window (OpenVINO 2026.4): there the native algorithm is
        skipped. Without VNNI the library's convolutions are 1.5 times as fast
        as products with windows; a LayerNorm takes the channels last.
        """
        ways = (NATIVE,)
        if geometry.place in ("first", "front"):
            ways = (NATIVE, CONVOLUTION)
            if self._convolve and geometry.then == "gelu":
                ways = (CONVOLUTION, NATIVE)
        elif geometry.place == "position":
            ways = (NATIVE, JOINED_GROUPS, WINDOW_PRODUCT)
            if geometry.groups == 1:
                ways = (NATIVE, WINDOW_PRODUCT)
            elif self._narrow_groups_fail and geometry.has_narrow_groups:
                ways = (JOINED_GROUPS, WINDOW_PRODUCT)
        return (*ways, FLOAT) if geometry.weight_bits else ways

    def run(self, geometry: Geometry, trial: Trial) -> Results:
        request = self._compiled(geometry, trial.layer).create_infer_request()
        found = []
        for x, other in zip(trial.inputs, trial.others, strict=True):
            if geometry.place == "first":
                x = x[:, :, 0].unfold(1, geometry.shape[2], geometry.stride)
            if _turned(geometry, trial.layer):
                x = x.mT
            given = {"x": x.contiguous().numpy()}
            if geometry.then == "sum":
                given["other"] = other.numpy()
            request.infer(given)
            frames = x.shape[1] if geometry.place == "position" else None
            found.append(output(request, frames=frames))
        return Results(found)

    def _compiled(
        self, geometry: Geometry, layer: AnyLayer
    ) -> ov.CompiledModel:
        builder = GraphBuilder(None, self._half)
        first = geometry.place == "first"
        width = geometry.shape[1] * geometry.groups
        width = geometry.shape[2] if first else width
        turned = _turned(geometry, layer)
        x = builder.input("x", [-1, width, -1] if turned else [-1, -1, width])
        if first:
            y = builder.first(x, layer, turned)
        elif turned:
            y = builder.conv(x, layer)
        elif geometry.place == "front":
            y = builder.strided(x, layer)
        elif geometry.place == "position":
            y = builder.turn(builder.conv(builder.turn(x), layer))
        else:
            y = builder.linear(x, layer)
        if geometry.then == "gelu":
            y = op.gelu(y, "erf")
        elif geometry.then == "sum":
            other = builder.input("other", [-1, -1, geometry.shape[0]])
            y = op.add(other, y)
        if turned:
            y = builder.turn(y)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": self.versions["precision"],
        }
        return core().compile_model(builder.model(y, "layer"), "CPU", settings)


def _turned(geometry: Geometry, layer: AnyLayer) -> bool:
    """Whether a layer is computed as in :func:`.graph.channels_first`."""
    front = geometry.place in ("first", "front") and geometry.then == "gelu"
    return front and layer.algorithm == CONVOLUTION
