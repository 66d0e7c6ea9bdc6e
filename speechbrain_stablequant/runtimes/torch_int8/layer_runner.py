"""Single layers by torch's oneDNN operators, for comparison with exact
arithmetic."""

from typing import Any

import torch

from ...core.encoder_spec import ConvSpec
from ...core.integer_layer import FloatLayer
from ..algorithms import FLOAT, NATIVE, Geometry
from ..cpu import cpu_class
from ..trial_layer import Results, Trial
from .conv import conv_algorithms, make_conv
from .forms import ZERO, Floats, Form, Grid
from .front import Stage
from .layer import make_layer
from .linear import SharedInput, make_linear, rows_of

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
        if geometry.place == "head":
            return Results(_head(geometry, trial))
        if geometry.place == "position":
            conv = make_conv(trial.layer, self._dtype)
            return Results(
                [
                    conv(conv.form.prepare(x), torch.float32)[:, : x.shape[1]]
                    for x in trial.inputs
                ]
            )
        run = self._front if geometry.is_conv else self._linear
        if geometry.then != "gelu" or not geometry.weight_bits:
            found = run(geometry, trial, Floats(torch.float32))
            return Results([x[None] for x in found])
        found = run(geometry, trial, Grid(_STEP, 8))
        values = [(x[None].float() - ZERO) * _STEP for x in found]
        return Results(values, _STEP, 127 * _STEP)

    def _front(
        self, geometry: Geometry, trial: Trial, then: Form
    ) -> list[torch.Tensor]:
        layer = trial.layer
        first = geometry.place == "first" and isinstance(layer, FloatLayer)
        dtype = torch.float32 if first else self._dtype
        stage = Stage(ConvSpec(layer, None), then, dtype)
        found = []
        for x in trial.inputs:
            x = stage.form.prepare(x[0])
            if geometry.then == "gelu":
                found.append(stage(x))
            else:
                windows = stage.windows(x, 0, stage.frames(len(x)))
                found.append(stage.product(windows, torch.float32))
        return found

    def _linear(
        self, geometry: Geometry, trial: Trial, then: Form
    ) -> list[torch.Tensor]:
        layer, found = trial.layer, []
        if geometry.then == "shared":
            shared = SharedInput([rows_of(layer, self._dtype)] * 3)
            for x in trial.inputs:
                found += shared(x[0], self._dtype).chunk(3, 1)
            return found
        product = make_linear(layer, self._dtype)
        for x, other in zip(trial.inputs, trial.others, strict=True):
            x = product.form.prepare(x[0])
            if geometry.then == "gelu":
                found.append(product.gelu(x, then))
            elif geometry.then == "sum":
                found.append(product.add_(x, other[0].clone()))
            else:
                found.append(product(x, torch.float32))
        return found


def _head(geometry: Geometry, trial: Trial) -> list[torch.Tensor]:
    """Compute a layer outside of the encoder."""
    forward = make_layer(trial.layer)
    if not geometry.is_conv:
        return [forward(x) for x in trial.inputs]
    return [forward(x.transpose(1, 2)).transpose(1, 2) for x in trial.inputs]
