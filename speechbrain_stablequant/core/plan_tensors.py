"""Tensors that a method decided, beside the numbers of a plan.

Most methods decide numbers: bits, ranges. Some decide the integers
themselves (adaptive rounding, error compensation), correct biases, or move
factors between a normalization and the layers behind it. Their tensors are
kept in a file beside ``plan.json``, so that the plan can be executed and used
again like any other.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..model.layers import Layer
from ..model.rotation import attached_rotations, is_rotation, rotated_encoder
from ..utils.files import parse_json, read_file, write_atomic
from ..utils.tensor_bytes import bytes_to_tensors, tensors_to_bytes
from ..utils.typed import one_line, short, typed
from .packing import pack, unpack

TENSORS_FORMAT = "speechbrain_stablequant.plan"
_PARTS = {
    "weight": torch.int8,
    "weight_scale": torch.float32,
    "bias": torch.float32,
}


@dataclass(frozen=True)
class _Description:
    """What the file says about its tensors: bits and shape of integers."""

    format: Literal["speechbrain_stablequant.plan"]
    weights: dict[str, list[int]]


@dataclass(frozen=True)
class LayerTensors:
    """What was decided for one quantized layer; None: as the plan's numbers
    say.

    Arguments
    ---------
    weight : torch.Tensor or None
        int8 in the shape of the float weight.
    weight_scale : torch.Tensor or None
        float32 [out], or [out, groups] with a scale for each group of
        inputs. Given with ``weight`` and not without.
    bias : torch.Tensor or None
        float32 [out], in place of the layer's own or where it has none.
    """

    weight: torch.Tensor | None = field(default=None, repr=False)
    weight_scale: torch.Tensor | None = field(default=None, repr=False)
    bias: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.weight is None) != (self.weight_scale is None):
            raise ValueError("integers and their scales belong together")

    def cpu(self) -> "LayerTensors":
        """The tensors in the memory of the host."""
        parts = self.weight, self.weight_scale, self.bias
        return LayerTensors(
            *(part if part is None else part.cpu() for part in parts)
        )


@dataclass(frozen=True)
class AdjustedTensors:
    """All tensors of a plan.

    Arguments
    ---------
    layers : dict
        LayerTensors of quantized layers, by name.
    floats : dict
        Changed parameters of everything else, float32, by their name in the
        state dict of the Brain's modules, and rotations of encoders' streams.
    """

    layers: dict[str, LayerTensors] = field(default_factory=dict)
    floats: dict[str, torch.Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.layers or self.floats)

    def cpu(self) -> "AdjustedTensors":
        """The tensors in the memory of the host."""
        return AdjustedTensors(
            {name: tensors.cpu() for name, tensors in self.layers.items()},
            {name: tensor.cpu() for name, tensor in self.floats.items()},
        )

    def digest(self) -> str:
        """Identifies the content.

        Returns
        -------
        str
            32 hexadecimal digits.

        Example
        -------
        >>> one = AdjustedTensors(floats={"a": torch.ones(2)})
        >>> two = AdjustedTensors(floats={"a": torch.zeros(2)})
        >>> one.digest() == two.digest()
        False
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.flat().items()):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            head = f"{name}:{tensor.dtype}:{tuple(tensor.shape)}"
            digest.update(head.encode())
            digest.update(flat.view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    def flat(self) -> dict[str, torch.Tensor]:
        """All tensors by name, as :meth:`from_flat` takes them.

        Returns
        -------
        dict

        Example
        -------
        >>> AdjustedTensors(floats={"a": torch.ones(1)}).flat()
        {'floats/a': tensor([1.])}
        """
        flat = {f"floats/{k}": v for k, v in self.floats.items()}
        for name, tensors in self.layers.items():
            for part in ("weight", "weight_scale", "bias"):
                value = getattr(tensors, part)
                if value is not None:
                    flat[f"layers/{name}/{part}"] = value
        return flat

    @classmethod
    def from_flat(cls, flat: Mapping[str, torch.Tensor]) -> "AdjustedTensors":
        """The inverse of :meth:`flat`.

        Arguments
        ---------
        flat : Mapping
            Tensors by name.

        Returns
        -------
        AdjustedTensors
        """
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

    # -- on disk -----------------------------------------------------------

    def save(self, path: str | Path, bits: Mapping[str, int]) -> str:
        """Writes the tensors, whole or not at all.

        Arguments
        ---------
        path : str or Path
            The file.
        bits : Mapping
            Bits of each layer's weights, by name.

        Returns
        -------
        str
            SHA-256 of the file.

        Example
        -------
        >>> path = getfixture("tmp_path") / "plan.safetensors"
        >>> integers = torch.tensor([[1, -7]], dtype=torch.int8)
        >>> tensors = LayerTensors(integers, torch.ones(1))
        >>> sha = AdjustedTensors({"enc": tensors}).save(path, {"enc": 4})
        >>> AdjustedTensors.load(path, sha).layers["enc"].weight
        tensor([[ 1, -7]], dtype=torch.int8)
        """
        tensors, weights = {}, {}
        for name, tensor in self.flat().items():
            tensor = tensor.detach().cpu().contiguous()
            kind, _, rest = name.partition("/")
            if kind == "layers" and rest.endswith("/weight"):
                layer = rest.removesuffix("/weight")
                weights[layer] = [bits[layer], *tensor.shape]
                tensor = pack(tensor, bits[layer])
            tensors[name] = tensor
        description = {"format": TENSORS_FORMAT, "weights": weights}
        header = {"description": json.dumps(description, sort_keys=True)}
        data = tensors_to_bytes(tensors, header)
        write_atomic(path, data)
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(
        cls, path: str | Path, sha256: str | None = None
    ) -> "AdjustedTensors":
        """Reads what :meth:`save` wrote.

        Arguments
        ---------
        path : str or Path
            The file.
        sha256 : str, optional
            What :meth:`save` returned: then it must be that file.

        Returns
        -------
        AdjustedTensors

        Raises
        ------
        ValueError
            The file is missing, is another one, or is damaged.
        """
        path = Path(path)
        try:
            data = read_file(path)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot read the tensors of the plan beside it "
                f"({error.strerror}); copy it together with its plan"
            ) from error
        if sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise ValueError(
                f"{path}: is not the file that the plan beside it was written "
                "with: it is damaged or of another run; copy both again"
            )
        try:
            tensors, header = bytes_to_tensors(data)
            text = typed(header.get("description"), str, "description")
            description = typed(parse_json(text), _Description, "description")
            return cls._parse(tensors, description.weights)
        except ValueError as error:
            raise ValueError(
                f"{path}: holds no tensors of a plan ({one_line(error)}); "
                "make it again"
            ) from error

    @classmethod
    def _parse(
        cls, tensors: Mapping[str, torch.Tensor], weights: Mapping[str, list]
    ) -> "AdjustedTensors":
        flat = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "layers" and rest.endswith("/weight"):
                layer = rest.removesuffix("/weight")
                if len(weights.get(layer, [])) < 2:
                    raise ValueError(f"{short(name)} has no bits and shape")
                bits, *shape = weights[layer]
                if min(shape) < 1:
                    raise ValueError(f"{short(name)} has the shape {shape}")
                tensor = unpack(tensor, bits, shape)
            flat[name] = tensor
        return cls.from_flat(flat)

    # -- the model that they are for ---------------------------------------

    def check_matches(
        self,
        layers: Iterable[Layer],
        modules: Mapping[str, nn.Module],
        path: str,
    ) -> None:
        """Raises unless each tensor fits its layer or parameter.

        Arguments
        ---------
        layers : iterable of Layer
            The layers of the model.
        modules : Mapping
            Its modules by key.
        path : str
            Where the plan came from, for the error.

        Raises
        ------
        ValueError
            Names the first that does not fit.
        """
        by_name = {layer.name: layer for layer in layers}
        for name, tensors in self.layers.items():
            layer = by_name.get(name)
            shape = None if layer is None else layer.module.weight.shape
            for part in ("weight", "weight_scale", "bias"):
                value = getattr(tensors, part)
                if value is None:
                    continue
                want = None
                if shape is not None:
                    want = shape if part == "weight" else shape[:1]
                    if part == "weight_scale" and value.dim() == 2:
                        # Groups of equal size along the inputs.
                        groups = value.shape[1]
                        good = len(shape) == 2 and shape[1] % groups == 0
                        want = (*shape[:1], groups) if good else shape[:1]
                _check_shape(f"{name}.{part}", value, want, path)
        state = _parameters(modules)
        for name, value in self.floats.items():
            if is_rotation(name):
                shape = _rotation_shape(modules, name)
            else:
                found = state.get(name)
                shape = None if found is None else found.shape
            _check_shape(name, value, shape, path)


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


def _rotation_shape(
    modules: Mapping[str, nn.Module], name: str
) -> tuple[int, int] | None:
    try:
        channels = rotated_encoder(modules, name).layer_norm.weight.numel()
    except KeyError:
        return None
    return channels, channels


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The live parameters by their name in the state dict."""
    return {
        f"{key}.{name}": parameter
        for key, module in modules.items()
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


@contextmanager
def adjusted_floats(
    modules: Mapping[str, nn.Module], floats: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Context in which parameters have other values, and streams are rotated.

    Arguments
    ---------
    modules : Mapping
        Modules by key.
    floats : Mapping
        Values by the parameter's name in the state dict; rotations by that
        of their buffer.

    Raises
    ------
    KeyError
        A name that is no parameter.

    Example
    -------
    >>> norm = nn.LayerNorm(1)
    >>> with adjusted_floats({"a": norm}, {"a.weight": torch.zeros(1)}):
    ...     norm.weight.item()
    0.0
    >>> norm.weight.item()
    1.0
    """
    state = _parameters(modules) if floats else {}
    # All names are looked up before anything is changed.
    targets = {name: state[name] for name in floats if not is_rotation(name)}
    kept = {name: t.detach().clone() for name, t in targets.items()}
    try:
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(floats[name])
        with attached_rotations(modules, floats):
            yield
    finally:
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(kept[name])
