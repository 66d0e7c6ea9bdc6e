"""Single layers by torch's oneDNN operators, for comparison with exact
arithmetic."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...core.encoder_spec import ConvSpec
from ...core.integer_layer import AnyLayer, FloatLayer
from ..cpu import cpu_class
from ..geometry import FLOAT, NATIVE, Geometry
from ..trial_layer import Results, Trial
from .conv import conv_algorithms, make_conv
from .front import Stage
from .head_layer import make_layer
from .input_forms import ZERO, Floats, Form, Grid
from .linear import FEW, SharedInput, make_linear, rows_of

#: Step of the grid of GELU results.
_STEP = 2.0**-4


class TorchInt8Runner:
    """Computes layers as the executor does, whatever its options."""

    name = "torch_int8"

    def __init__(self, **options: Any):
        cpu = cpu_class()
        self._dtype = torch.bfloat16 if cpu.bf16 else torch.float32
        self._narrow_groups_fail = cpu.name == "amx"
        self.versions = {
            "torch": torch.__version__,
            "precision": str(self._dtype),
        }

    def half(self, geometry: Geometry) -> bool:
        rounded = not geometry.weight_bits or geometry.then == "shared"
        return rounded and self._dtype == torch.bfloat16

    def algorithms(self, geometry: Geometry) -> tuple[str, ...]:
        """oneDNN's AMX kernels are wrong for bfloat16 convolutions with few
        channels per group and a long window (torch 2.11): there the native
        algorithm is skipped.
        """
        if geometry.place not in ("position", "head") or not geometry.is_conv:
            return (NATIVE, FLOAT)
        integers = geometry.weight_bits > 0
        ways = conv_algorithms(integers, geometry.groups, geometry.dilation)
        fails = self._narrow_groups_fail and geometry.has_narrow_groups
        return ways[1:] if fails and not integers else ways

    @torch.no_grad()
    def run(self, geometry: Geometry, trial: Trial) -> Results:
        on_grid = geometry.then == "gelu" and geometry.weight_bits > 0
        then = Grid(_STEP, 8) if on_grid else Floats(torch.float32)
        compute = self._function(geometry, trial.layer, then)
        rows = zip(trial.inputs, trial.others, strict=True)
        found = [y for x, other in rows for y in compute(x, other)]
        if not on_grid:
            return Results(found)
        values = [(y.float() - ZERO) * _STEP for y in found]
        return Results(values, _STEP, 127 * _STEP)

    def _function(
        self, geometry: Geometry, layer: AnyLayer, then: Form
    ) -> Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]:
        """Results [1, frames, out] from an input and what may be added."""
        dtype, full = self._dtype, torch.float32
        if geometry.place == "head":
            forward = make_layer(layer)
            if not geometry.is_conv:
                return lambda x, _: [
                    torch.cat([forward(x[:, :FEW]), forward(x[:, FEW:])], 1)
                ]
            return lambda x, _: [forward(x.mT).mT]
        if geometry.place == "position":
            conv = make_conv(layer, dtype)
            ready = conv.form.prepare
            return lambda x, _: [conv(ready(x), full)[:, : x.shape[1]]]
        if geometry.is_conv:
            if geometry.place == "first" and isinstance(layer, FloatLayer):
                dtype = full
            stage = Stage(ConvSpec(layer, None), then, dtype)
            ready = stage.form.prepare
            if geometry.then == "gelu":
                return lambda x, _: [stage(ready(x[0]))[None]]

            def multiply(x: torch.Tensor, other: torch.Tensor) -> Any:
                windows = stage.windows(ready(x[0]), 0, other.shape[1])
                return [stage.product(windows, full)[None]]

            return multiply
        if geometry.then == "shared":
            shared = SharedInput([rows_of(layer, dtype)] * 3)
            return lambda x, _: shared(x[0], dtype)[None].chunk(3, 2)
        product = make_linear(layer, dtype)
        ready = product.form.prepare
        return {
            "gelu": lambda x, _: [product.gelu(ready(x[0]), then)[None]],
            "sum": lambda x, other: [
                product.add_(ready(x[0]), other[0].clone())[None]
            ],
            "": lambda x, _: [product(ready(x[0]), full)[None]],
        }[geometry.then]
