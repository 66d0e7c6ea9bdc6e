"""Tensors of a plan: integers, biases and parameters that a method chose."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..model.rotation import attached_rotations, is_rotation, rotated_encoder
from ..utils.files import parse_json, read_file, write_atomic
from ..utils.patching import restored_values
from ..utils.tensor_bytes import (
    bytes_to_tensors,
    headed_digest,
    tensors_to_bytes,
)
from ..utils.typed import one_line, short, typed
from .layer_quant import LayerTensors
from .packing import pack, unpack

TENSORS_FORMAT = "speechbrain_stablequant.plan"

_PARTS = dict.fromkeys(("weight_scale", "bias"), torch.float32)
_PARTS["weight"] = torch.int8


@dataclass(frozen=True)
class _Description:
    """Header of the file: bits and shape of each packed weight."""

    format: Literal["speechbrain_stablequant.plan"]
    weights: dict[str, list[int]]


@dataclass(frozen=True)
class AdjustedTensors:
    """Tensors of quantized layers, and changed float32 parameters by name."""

    layers: dict[str, LayerTensors] = field(default_factory=dict)
    floats: dict[str, torch.Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.layers or self.floats)

    def cpu(self) -> "AdjustedTensors":
        return AdjustedTensors(
            {name: tensors.cpu() for name, tensors in self.layers.items()},
            {name: tensor.cpu() for name, tensor in self.floats.items()},
        )

    def digest(self) -> str:
        flat = sorted(self.flat().items())
        return headed_digest(
            (f"{name}:{x.dtype}:{tuple(x.shape)}", x) for name, x in flat
        )

    def flat(self) -> dict[str, torch.Tensor]:
        """Returns all tensors by one name each."""
        flat = {f"floats/{k}": v for k, v in self.floats.items()}
        for name, tensors in self.layers.items():
            for part, tensor in tensors.named().items():
                flat[f"layers/{name}/{part}"] = tensor
        return flat

    @classmethod
    def from_flat(cls, flat: Mapping[str, torch.Tensor]) -> "AdjustedTensors":
        floats: dict[str, torch.Tensor] = {}
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in flat.items():
            kind, _, rest = name.partition("/")
            if not (name.isprintable() and bool(tensor.isfinite().all())):
                raise ValueError(f"{short(name)} holds what is no number")
            if kind == "floats":
                floats[rest] = tensor
                continue
            layer, _, part = rest.rpartition("/")
            if kind != "layers" or _PARTS.get(part) != tensor.dtype:
                raise ValueError(f"{short(name)} is no part of a plan")
            if part == "weight_scale" and not bool((tensor > 0).all()):
                raise ValueError(f"{short(name)} is not positive")
            layers.setdefault(layer, {})[part] = tensor
        return cls(
            {name: LayerTensors(**parts) for name, parts in layers.items()},
            floats,
        )

    def check_fits(
        self,
        shapes: Mapping[str, torch.Size],
        modules: Mapping[str, nn.Module],
        path: str,
    ) -> None:
        """Raises unless each tensor fits; ``shapes`` are those of weights."""
        for name, tensors in self.layers.items():
            shape = shapes[name]
            for part, tensor in tensors.named().items():
                needed = shape if part == "weight" else shape[:1]
                _check_shape(f"{name}.{part}", tensor, needed, path)
        state = parameters_by_name(modules)
        for name, tensor in self.floats.items():
            try:
                if is_rotation(name):
                    encoder = rotated_encoder(modules, name)
                    shape = (encoder.layer_norm.weight.numel(),) * 2
                else:
                    shape = state[name].shape
            except KeyError:
                shape = None
            _check_shape(name, tensor, shape, path)


def _check_shape(
    name: str,
    value: torch.Tensor,
    shape: Iterable[int] | None,
    path: str,
) -> None:
    if shape is not None and tuple(value.shape) == tuple(shape):
        return
    needs = "the model has none" if shape is None else f"not {list(shape)}"
    raise ValueError(
        f"quantize.plan: {path}: the plan's tensor '{name}' has shape "
        f"{list(value.shape)}, {needs}; use the plan of this model"
    )


def parameters_by_name(
    modules: Mapping[str, nn.Module],
) -> dict[str, torch.Tensor]:
    """Returns the live parameters by their name in the state dict."""
    return {
        f"{key}.{name}": parameter
        for key, module in modules.items()
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


@contextmanager
def adjusted_floats(
    modules: Mapping[str, nn.Module], floats: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Context in which parameters have other values and streams are rotated."""
    state = parameters_by_name(modules) if floats else {}
    # Look up all names before changing anything.
    targets = {name: state[name] for name in floats if not is_rotation(name)}
    with restored_values(targets.values()):
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(floats[name])
        with attached_rotations(modules, floats):
            yield


def write_tensors(
    path: Path | None, adjusted: AdjustedTensors, bits: Mapping[str, int]
) -> str:
    """Writes tensors, weights packed, if there is a path; returns the SHA-256
    of their file."""
    tensors, weights = adjusted.flat(), {}
    for name, layer in adjusted.layers.items():
        if layer.weight is not None:
            weights[name] = [bits[name], *layer.weight.shape]
            packed = pack(layer.weight.detach().cpu(), bits[name])
            tensors[f"layers/{name}/weight"] = packed
    description = {"format": TENSORS_FORMAT, "weights": weights}
    header = {"description": json.dumps(description, sort_keys=True)}
    data = tensors_to_bytes(tensors, header)
    if path is not None:
        write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, sha256: str) -> AdjustedTensors:
    """Reads and checks what :func:`write_tensors` wrote."""
    try:
        data = read_file(path)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot read the tensors of the plan beside it "
            f"({error.strerror}); copy it together with its plan"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{path}: is not the file that the plan beside it was written "
            "with: it is damaged or of another run; copy both again"
        )
    try:
        tensors, header = bytes_to_tensors(data)
        text = typed(header.get("description"), str, "description")
        description = typed(parse_json(text), _Description, "description")
        for layer, (bits, *shape) in description.weights.items():
            name = f"layers/{layer}/weight"
            if name not in tensors or min(shape, default=0) < 1:
                raise ValueError(f"{short(name)} cannot be {shape}")
            tensors[name] = unpack(tensors[name], bits, shape)
        return AdjustedTensors.from_flat(tensors)
    except ValueError as error:
        raise ValueError(
            f"{path}: holds no tensors of a plan ({one_line(error)}); "
            "make it again"
        ) from error
