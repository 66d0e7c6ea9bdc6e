"""A layer of a weights file: its row in the header, and its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from ..core.affine import MAX_BITS, MIN_BITS, qmax, scale_from_amax
from ..core.integer_layer import IntegerLayer
from ..core.packing import check_packed, unpack
from ..core.plan import PLAN_FILE, QuantizationPlan
from ..utils.typed import short
from .errors import CheckpointError
from .tensor_file import TensorFile

_GEOMETRY = ("stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class LayerRow:
    """A layer in the description of the file."""

    kind: Literal["linear", "conv1d"]
    weight_bits: int
    activation_bits: int
    shape: list[int]
    bias: bool
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    activation_offset: float = 0.0


def describe_layer(layer: IntegerLayer) -> dict[str, Any]:
    """Returns the row of a layer."""
    row = {
        "kind": layer.kind,
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
        "shape": list(layer.weight.shape),
        "bias": layer.bias is not None,
    }
    if layer.kind == "conv1d":
        row.update({key: getattr(layer, key) for key in _GEOMETRY})
    if layer.activation_offset:
        row["activation_offset"] = layer.activation_offset
    return row


def read_layer(
    name: str,
    row: LayerRow,
    file: TensorFile,
    outlines: dict[str, torch.Tensor],
) -> IntegerLayer:
    """Reads a layer, whose weight stays in the file; removes its tensors from
    ``outlines``."""
    _check_row(name, row)
    shape = torch.Size(row.shape)

    def outline(part: str) -> torch.Tensor:
        if f"{name}.{part}" not in outlines:
            raise ValueError(f"there is no tensor '{name}.{part}'")
        return outlines.pop(f"{name}.{part}")

    def take(part: str) -> torch.Tensor:
        dtype = outline(part).dtype
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"layer '{name}': {part} is {dtype}")
        return file.read(f"{name}.{part}")

    weight_scale = take("weight_scale")
    activation_scale = take("activation_scale")
    bias = take("bias") if row.bias else None
    for part, tensor, expected in (
        ("weight_scale", weight_scale, shape[:1]),
        ("activation_scale", activation_scale, activation_scale.shape[:1]),
        ("bias", bias, shape[:1]),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"layer '{name}': {part} has shape {list(tensor.shape)}, "
                f"the weight needs {list(expected)}"
            )
    if activation_scale.numel() != 1:
        raise ValueError(f"layer '{name}': activation_scale is not one value")
    bits = row.weight_bits
    try:
        check_packed(outline("weight"), bits, shape)
    except ValueError as error:
        raise ValueError(f"layer '{name}': {error}") from error
    return IntegerLayer(
        name=name,
        kind=row.kind,
        weight=torch.empty(shape, dtype=torch.int8, device="meta"),
        weight_scale=weight_scale,
        weight_bits=bits,
        activation_scale=activation_scale,
        activation_bits=row.activation_bits,
        bias=None if bias is None else bias.float(),
        read=partial(_read_weight, file, f"{name}.weight", bits, shape),
        activation_offset=row.activation_offset,
        **{key: getattr(row, key) for key in _GEOMETRY},
    )


def _check_row(name: str, row: LayerRow) -> None:
    """Checks that a layer's description is possible."""
    sizes = row.shape
    plain = [getattr(row, key) == getattr(LayerRow, key) for key in _GEOMETRY]
    conv = row.kind == "conv1d"
    # The check of groups needs a shape; without one it is named instead.
    shaped = len(sizes) == (3 if conv else 2) and min(sizes) > 0
    checks = {
        "weight_bits": MIN_BITS <= row.weight_bits <= MAX_BITS,
        "activation_bits": MIN_BITS <= row.activation_bits <= MAX_BITS,
        "shape": shaped,
        "stride": row.stride > 0,
        "padding": row.padding >= 0,
        "dilation": row.dilation > 0,
        "groups": row.groups > 0 and (not shaped or sizes[0] % row.groups == 0),
        "kind": conv or all(plain),
    }
    for key, good in checks.items():
        if not good:
            value = short(getattr(row, key))
            raise ValueError(f"layer '{name}': {key} cannot be {value}")


def check_scales(
    integers: Mapping[str, IntegerLayer], plan: QuantizationPlan
) -> None:
    """Checks that scales are positive and those of inputs equal the plan's."""
    quants = plan.quants()
    for name, layer in integers.items():
        quant = quants[name]
        scale = layer.weight_scale
        if not (scale.isfinite().all() and (scale > 0).all()):
            raise ValueError(
                f"layer '{name}': weight_scale has a value that is not positive"
            )
        planned = scale_from_amax(
            torch.tensor(quant.activation_amax), quant.activation_bits
        )
        if not torch.allclose(
            layer.activation_scale.reshape(()), planned, rtol=1e-5, atol=0
        ):
            raise ValueError(
                f"layer '{name}': its inputs have the scale "
                f"{float(layer.activation_scale):g}, in {PLAN_FILE} it is "
                f"{float(planned):g}"
            )
        here, there = layer.activation_offset, quant.activation_offset
        if here != there:
            raise ValueError(
                f"layer '{name}': its activation_offset is {here:g}, in "
                f"{PLAN_FILE} it is {there:g}"
            )


def _read_weight(
    file: TensorFile, name: str, bits: int, shape: torch.Size
) -> torch.Tensor:
    weight = unpack(file.read(name), bits, shape)
    if int(weight.min()) < -qmax(bits):
        raise CheckpointError(
            f"{file.path}: '{name}' holds {int(weight.min())}, beyond the "
            f"range of {bits} bits; make it again"
        )
    return weight
