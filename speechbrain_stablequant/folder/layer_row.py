"""A layer of a weights file: its row in the header, and its tensors."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from ..core.affine import FLOAT_BITS, MAX_BITS, MIN_BITS, qmax
from ..core.integer_layer import IntegerLayer, Sizes
from ..core.layer_quant import LayerQuant
from ..core.packing import check_packed, unpack
from ..core.plan import PLAN_FILE
from ..utils.typed import short
from .errors import CheckpointError
from .tensor_file import TensorFile

_KEYS = ("kind", "weight_bits", "activation_bits")
_GEOMETRY = ("stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class LayerRow:
    """A layer in the description of the file."""

    kind: Literal["linear", "conv1d", "conv2d"]
    weight_bits: int
    activation_bits: int
    shape: list[int]
    bias: bool
    stride: Sizes = 1
    padding: Sizes = 0
    dilation: Sizes = 1
    groups: int = 1
    activation_offset: float = 0.0


def describe_layer(layer: IntegerLayer) -> dict[str, Any]:
    """Returns the row of a layer, as JSON."""
    geometry = () if layer.kind == "linear" else _GEOMETRY
    # Absent where a layer does not use it.
    extras = ("activation_offset",) if layer.activation_offset else ()
    row = {key: getattr(layer, key) for key in (*_KEYS, *geometry, *extras)}
    shape, bias = list(layer.weight.shape), layer.bias is not None
    return {**row, "shape": shape, "bias": bias}


def read_layer(
    name: str,
    row: LayerRow,
    quant: LayerQuant,
    file: TensorFile,
    outlines: dict[str, torch.Tensor],
) -> IntegerLayer:
    """Reads and checks a layer; removes its tensors from ``outlines``."""
    try:
        _check_row(row)
        layer = _read_layer(name, row, file, outlines)
        _check_scales(layer, quant)
    except ValueError as error:
        raise ValueError(f"layer '{name}': {error}") from error
    return layer


def _check_row(row: LayerRow) -> None:
    """Checks that a layer's description is possible."""
    sizes = row.shape
    plain = [getattr(row, key) == getattr(LayerRow, key) for key in _GEOMETRY]
    dimensions = {"linear": 2, "conv1d": 3, "conv2d": 4}[row.kind]
    # Of a wrong shape the error names the shape, not the groups.
    shaped = len(sizes) == dimensions and min(sizes) > 0

    def at_least(size: Sizes, least: int) -> bool:
        pair = isinstance(size, tuple) and len(size) == 2
        one = pair if row.kind == "conv2d" else isinstance(size, int)
        return one and min(size if pair else (size,)) >= least

    checks = {
        "weight_bits": MIN_BITS <= row.weight_bits <= MAX_BITS,
        "activation_bits": MIN_BITS <= row.activation_bits <= MAX_BITS
        or row.activation_bits == FLOAT_BITS,
        "shape": shaped,
        "stride": at_least(row.stride, 1),
        "padding": at_least(row.padding, 0),
        "dilation": at_least(row.dilation, 1),
        "groups": row.groups > 0 and (not shaped or sizes[0] % row.groups == 0),
        "kind": dimensions > 2 or all(plain),
    }
    for key, good in checks.items():
        if not good:
            raise ValueError(f"{key} cannot be {short(getattr(row, key))}")


def _read_layer(
    name: str,
    row: LayerRow,
    file: TensorFile,
    outlines: dict[str, torch.Tensor],
) -> IntegerLayer:
    def outline(part: str) -> torch.Tensor:
        if f"{name}.{part}" not in outlines:
            raise ValueError(f"there is no tensor '{name}.{part}'")
        return outlines.pop(f"{name}.{part}")

    def take(part: str, *shapes: tuple[int, ...]) -> torch.Tensor:
        found = outline(part)
        if found.dtype not in (torch.float32, torch.float16):
            raise ValueError(f"{part} is {found.dtype}")
        if tuple(found.shape) not in shapes:
            raise ValueError(
                f"{part} has shape {list(found.shape)}, the layer needs "
                f"{list(shapes[0])}"
            )
        return file.read(f"{name}.{part}")

    shape, bits = torch.Size(row.shape), row.weight_bits
    check_packed(outline("weight"), bits, shape)
    return IntegerLayer(
        name=name,
        kind=row.kind,
        weight=torch.empty(shape, dtype=torch.int8, device="meta"),
        weight_scale=take("weight_scale", (shape[0],)),
        weight_bits=bits,
        activation_scale=take("activation_scale", (1,), ()),
        activation_bits=row.activation_bits,
        bias=take("bias", (shape[0],)).float() if row.bias else None,
        read=partial(_read_weight, file, f"{name}.weight", bits, shape),
        activation_offset=row.activation_offset,
        **{key: getattr(row, key) for key in _GEOMETRY},
    )


def _check_scales(layer: IntegerLayer, quant: LayerQuant) -> None:
    """Checks that scales are positive, and equal the plan's for inputs."""
    scale = layer.weight_scale
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise ValueError("weight_scale has a value that is not positive")
    planned = quant.input_scale()
    found = layer.activation_scale.reshape(())
    if not torch.allclose(found, planned, rtol=1e-5, atol=0):
        raise ValueError(
            f"its inputs have the scale {float(found):g}, in {PLAN_FILE} it is "
            f"{float(planned):g}"
        )
    here, there = layer.activation_offset, quant.activation_offset
    if here != there:
        raise ValueError(
            f"its activation_offset is {here:g}, in {PLAN_FILE} it is {there:g}"
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
