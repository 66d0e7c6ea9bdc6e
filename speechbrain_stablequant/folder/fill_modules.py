"""Gives a recognizer's modules the parameters that a folder stores."""

from collections.abc import Mapping
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..core.integer_layer import IntegerLayer, in_integers, layer_geometry
from ..model import products
from ..model.layers import layer_kind
from ..model.rotation import attach_rotations, rotation_of
from ..utils.typed import one_line
from .errors import CheckpointError, reading
from .stored_floats import float_state


def fill_modules(
    modules: Mapping[str, nn.Module],
    integers: Mapping[str, IntegerLayer],
    floats: Mapping[str, torch.Tensor],
    where: str | Path,
) -> None:
    """Gives modules their float parameters, those of weight-only layers
    included, and frees the weights of other integer layers.

    Modules may be on ``meta``. Raises CheckpointError, which names ``where``.
    """
    by_name = products.modules_by_name(modules)
    floats = dict(floats)
    advice = "the folder's files belong to different models"
    with reading(where, "does not fit the model", advice):
        for name, layer in integers.items():
            module = by_name.get(name)
            _check_fit(module, layer)
            if layer.weight_only:
                _dequantize(name, module, layer, floats)
                continue
            if isinstance(module, products.RowsLinear):
                # Its owner's bias is stored, too.
                floats.pop(f"{name}.bias", None)
                continue
            if products.owners_of(name, by_name):
                products.free_parameter(module, "weight")
            else:
                _free_weight(module)
            if module.bias is None and layer.bias is not None:
                # A bias correction for a layer without a bias.
                module.bias = nn.Parameter(torch.empty_like(layer.bias))
        integers = in_integers(integers)
        tied = products.tied_parameters(modules, integers)
        covered = products.covered_parameters(modules, integers)
        for name in covered.keys() - tied.keys():
            products.free_parameter(*covered[name])
        _rotate(modules, floats)
        _check_floats(float_state(modules, integers), floats)
        for name, layer in tied.items():
            floats[name] = integers[layer].loaded().float_weight()
    for key, module in modules.items():
        prefix = f"{key}."
        state = {
            name.removeprefix(prefix): value
            for name, value in floats.items()
            if name.startswith(prefix)
        }
        module.load_state_dict(state, assign=True)
        named = chain(module.named_parameters(), module.named_buffers())
        for name, tensor in named:
            if tensor.is_meta:
                raise CheckpointError(
                    f"{where}: has no value for '{key}.{name}'; make it again"
                )


def _check_fit(module: nn.Module | None, layer: IntegerLayer) -> None:
    if module is None or layer_kind(module) != layer.kind:
        raise ValueError(f"the model has no {layer.kind} layer '{layer.name}'")
    geometry = {key: getattr(layer, key) for key in layer_geometry(module)}
    if (
        module.weight.shape != layer.weight.shape
        or layer_geometry(module) != geometry
        or (module.bias is not None and layer.bias is None)
    ):
        raise ValueError(
            f"layer '{layer.name}' of shape {list(layer.weight.shape)} "
            f"{geometry or ''} is not the model's, which is {one_line(module)}"
        )


def _dequantize(
    name: str,
    module: nn.Module,
    layer: IntegerLayer,
    floats: dict[str, torch.Tensor],
) -> None:
    """Adds the weight of a weight-only layer to the floats."""
    weight = layer.loaded().float_weight()
    if not isinstance(module, products.RowsLinear):
        _free_weight(module)
        module.weight = nn.Parameter(torch.empty_like(weight, device="meta"))
        floats[f"{name}.weight"] = weight
        return
    floats.pop(f"{name}.bias", None)
    rows = [(module.weight_name, module.rows, weight)]
    if layer.bias is not None:
        rows.append((module.bias_name, module.bias_rows, layer.bias))
    for attribute, place, value in rows:
        full = f"{name.rpartition('.')[0]}.{attribute}"
        if full not in floats:
            whole = attrgetter(attribute)(module.owner)
            floats[full] = torch.empty(whole.shape)
        floats[full][place] = value


def _free_weight(module: nn.Module) -> None:
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight")
    module.weight = None


def _rotate(
    modules: Mapping[str, nn.Module], floats: Mapping[str, torch.Tensor]
) -> None:
    """Attaches the rotations of hidden states, which plain models lack."""
    try:
        encoders = attach_rotations(modules, floats)
    except KeyError as error:
        raise ValueError(f"the model has no encoder for {error}") from None
    for encoder in encoders:
        found, width = rotation_of(encoder), encoder.layer_norm.weight.numel()
        if found.shape != (width, width):
            raise ValueError(
                f"a rotation is {_shape(found)}, and the model needs "
                f"{[width, width]}"
            )


def _check_floats(
    wanted: Mapping[str, torch.Tensor], floats: Mapping[str, torch.Tensor]
) -> None:
    for name in [*wanted, *floats]:
        here, there = _shape(floats.get(name)), _shape(wanted.get(name))
        if here != there:
            raise ValueError(f"'{name}' is {here}, and the model needs {there}")


def _shape(tensor: torch.Tensor | None) -> str:
    return "not there" if tensor is None else str(list(tensor.shape))
