"""Gives a recognizer's modules the parameters that a folder stores."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..core.integer_layer import IntegerLayer, layer_geometry
from ..model.rotation import attach_rotations, rotation_of
from ..utils.typed import one_line
from .errors import CheckpointError
from .stored_floats import float_state


def fill_modules(
    modules: Mapping[str, nn.Module],
    integers: Mapping[str, IntegerLayer],
    floats: Mapping[str, torch.Tensor],
    where: str,
) -> None:
    """Gives modules their float parameters and releases the weights of integer
    layers.

    Modules may be on the ``meta`` device. Raises CheckpointError, which names
    ``where`` and the first layer or tensor that does not fit.
    """
    by_name = {
        name: child
        for key, module in modules.items()
        for name, child in module.named_modules(prefix=key)
    }
    for name, layer in integers.items():
        module = by_name.get(name)
        _check_fit(module, layer, where)
        _free_weight(module)
        if module.bias is None and layer.bias is not None:
            # A bias correction for a layer without a bias.
            module.bias = nn.Parameter(torch.empty_like(layer.bias))
    _rotate(modules, floats, where)
    wanted = float_state(modules, list(integers))
    for name in [*wanted, *floats]:
        expected, found = wanted.get(name), floats.get(name)
        if expected is None or found is None or expected.shape != found.shape:
            raise CheckpointError(
                f"{where}: '{name}' is {_shape(found)}, and the model needs "
                f"{_shape(expected)}; the folder's files belong to different "
                "models"
            )
    for key, module in modules.items():
        start = len(key) + 1
        state = {
            name[start:]: value
            for name, value in floats.items()
            if name.startswith(f"{key}.")
        }
        module.load_state_dict(state, assign=True)
        for name, tensor in [
            *module.named_parameters(),
            *module.named_buffers(),
        ]:
            if tensor.is_meta:
                raise CheckpointError(
                    f"{where}: has no value for '{key}.{name}'; make it again"
                )


def _rotate(
    modules: Mapping[str, nn.Module],
    floats: Mapping[str, torch.Tensor],
    where: str,
) -> None:
    """Attaches the rotations of hidden states, which the plain model does not
    have."""
    try:
        encoders = attach_rotations(modules, floats)
    except KeyError as error:
        raise CheckpointError(
            f"{where}: the model has no encoder for {error}; the folder's "
            "files belong to different models"
        ) from error
    for encoder in encoders:
        channels = encoder.layer_norm.weight.numel()
        found = rotation_of(encoder)
        if found.shape != (channels, channels):
            raise CheckpointError(
                f"{where}: a rotation is {_shape(found)}, and the model needs "
                f"{[channels, channels]}; the folder's files belong to "
                "different models"
            )


def _shape(tensor: torch.Tensor | None) -> str:
    return "not there" if tensor is None else str(list(tensor.shape))


def _check_fit(
    module: nn.Module | None, layer: IntegerLayer, where: str
) -> None:
    kinds = {"linear": nn.Linear, "conv1d": nn.Conv1d}
    if not isinstance(module, kinds[layer.kind]):
        raise CheckpointError(
            f"{where}: the model has no {layer.kind} layer '{layer.name}'; "
            "the folder's files belong to different models"
        )
    geometry = {key: getattr(layer, key) for key in layer_geometry(module)}
    if (
        module.weight.shape != layer.weight.shape
        or layer_geometry(module) != geometry
        or (module.bias is not None and layer.bias is None)
    ):
        raise CheckpointError(
            f"{where}: layer '{layer.name}' of shape "
            f"{list(layer.weight.shape)} {geometry or ''} is not the model's, "
            f"which is {one_line(module)}; the folder's files belong to "
            "different models"
        )


def _free_weight(module: nn.Module) -> None:
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight")
    module.weight = None
