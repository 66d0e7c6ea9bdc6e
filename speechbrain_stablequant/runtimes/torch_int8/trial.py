"""Single layers by torch's oneDNN operators, for comparison with exact
arithmetic."""

from typing import Any

import torch

from ...core.encoder_spec import AnyLayer, ConvSpec
from ...core.integer_layer import FloatLayer, IntegerLayer
from ..algorithms import FLOAT, NATIVE, WIDE_GROUP
from ..cpu import cpu_class
from ..geometry import Geometry
from ..trial import Results, Trial
from .conv import conv_algorithms, make_conv
from .forms import ZERO, Floats, Form, Grid
from .front import Stage
from .layer import make_layer
from .linear import SharedInput, make_linear, rows_of

#: Step of the grid of GELU results.
_STEP = 2.0**-4


class TorchInt8Runner:
    """Computes layers as the executor does."""

    name = "torch_int8"

    def __init__(self) -> None:
        cpu = cpu_class()
        self._dtype = torch.bfloat16 if cpu.bf16 else torch.float32
        self._narrow_groups_fail = cpu.name == "amx"
        self.versions = {
            "torch": torch.__version__,
            "precision": str(self._dtype),
        }

    def half(self, geometry: Geometry) -> bool:
        """See :class:`..layer_check.LayerRunner`."""
        rounded = not geometry.weight_bits or geometry.then == "shared"
        return rounded and self._dtype == torch.bfloat16

    def algorithms(self, geometry: Geometry) -> tuple[str, ...]:
        """See :class:`..layer_check.LayerRunner`.

        oneDNN's AMX kernels are wrong for bfloat16 convolutions with few
        channels per group and a long window (torch 2.11): there the native
        algorithm is skipped.
        """
        conv = geometry.place in ("position", "head") and geometry.is_conv
        if not conv:
            return (NATIVE, FLOAT)
        integers = geometry.weight_bits > 0
        ways = conv_algorithms(integers, geometry.groups, geometry.dilation)
        narrow = geometry.groups > 1 and geometry.shape[1] < WIDE_GROUP
        if self._narrow_groups_fail and narrow and not integers:
            return ways[1:]
        return ways

    @torch.no_grad()
    def run(self, geometry: Geometry, trial: Trial) -> Results:
        """See :class:`..layer_check.LayerRunner`."""
        layer = trial.layer
        if geometry.place == "head":
            return Results(_head(geometry, layer, trial.inputs))
        if geometry.place == "position":
            conv = make_conv(layer, self._dtype)
            found = [
                conv(conv.form.prepare(x), torch.float32)[:, : x.shape[1]]
                for x in trial.inputs
            ]
            return Results(found)
        then: Form = Floats(torch.float32)
        step, top = 0.0, float("inf")
        if geometry.then == "gelu" and geometry.weight_bits:
            then, step = Grid(_STEP, 8), _STEP
            top = 127 * _STEP
        if geometry.is_conv:
            found = self._front(geometry, layer, trial.inputs, then)
        else:
            found = self._linear(geometry, trial, then)
        values = [x[None] for x in found]
        if step:
            values = [(x.float() - ZERO) * step for x in values]
        return Results(values, step, top)

    def _front(
        self,
        geometry: Geometry,
        layer: AnyLayer,
        inputs: list[torch.Tensor],
        then: Form,
    ) -> list[torch.Tensor]:
        first = geometry.place == "first" and isinstance(layer, FloatLayer)
        dtype = torch.float32 if first else self._dtype
        stage = Stage(ConvSpec(layer, None), then, dtype)
        found = []
        for x in inputs:
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


def _head(
    geometry: Geometry, layer: IntegerLayer, inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Compute a layer outside of the encoder."""
    forward = make_layer(layer)
    if not geometry.is_conv:
        return [forward(x) for x in inputs]
    return [forward(x.transpose(1, 2)).transpose(1, 2) for x in inputs]


def make_runner(**options: Any) -> TorchInt8Runner:
    """The runner of this runtime; options do not change results."""
    return TorchInt8Runner()
