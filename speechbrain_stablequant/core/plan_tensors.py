"""Tensors of a plan: integers, biases and parameters that a method chose."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..model.rotation import attached_rotations, is_rotation, rotated_encoder
from ..utils.patching import restored_values
from ..utils.tensor_bytes import headed_digest
from ..utils.typed import short
from .layer_quant import LayerTensors

_PARTS = dict.fromkeys(("weight_scale", "bias"), torch.float32)
_PARTS["weight"] = torch.int8


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
