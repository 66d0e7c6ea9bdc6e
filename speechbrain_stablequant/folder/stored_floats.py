"""What stays floating point in a quantized model, and how it is stored."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..core.integer_layer import IntegerLayer
from ..model.products import covered_parameters
from ..utils.patching import restored_values
from .errors import CheckpointError

# Relative to a tensor's largest value: the rounding error of half precision.
_HALF_ERROR = 2**-11


def float_state(
    modules: Mapping[str, nn.Module], names: Collection[str]
) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers but the weights of quantized layers."""
    weights = {f"{name}.weight" for name in names}
    weights |= covered_parameters(modules, names).keys()
    # The integer weight replaces both parts of a weight norm.
    parts = tuple(f"{name}.parametrizations.weight." for name in names)
    state = {}
    for key, module in modules.items():
        for name, tensor in module.state_dict(prefix=f"{key}.").items():
            if name in weights or name.startswith(parts):
                continue
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(
                    f"{name}: is a {type(tensor).__name__}, which cannot be "
                    "stored without pickle; leave the module out of the "
                    "recipe's `modules`"
                )
            state[name] = tensor.detach()
    return state


def stored_float(tensor: torch.Tensor, float_dtype: str) -> torch.Tensor:
    """Returns a tensor as stored: float16 only where that is precise enough."""
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.float()
    if float_dtype == "float32" or tensor.numel() == 0:
        return tensor
    half = tensor.half()
    error = (half.float() - tensor).abs().max()
    # False for NaN, which then stays visible.
    return half if error <= _HALF_ERROR * tensor.abs().max() else tensor


def stored_layer(layer: IntegerLayer, float_dtype: str) -> IntegerLayer:
    """Returns a layer with the bias that a checkpoint stores."""
    if layer.bias is None:
        return layer
    bias = stored_float(layer.bias, float_dtype).float()
    return replace(layer, bias=bias.to(layer.bias.device))


@contextmanager
def rounded_floats(
    modules: Mapping[str, nn.Module], names: Collection[str], float_dtype: str
) -> Iterator[None]:
    """Context in which modules have the values that are loaded later."""
    tensors = float_state(modules, names).values()
    stored = [(tensor, stored_float(tensor, float_dtype)) for tensor in tensors]
    rounded = [(x, y) for x, y in stored if y.dtype == torch.float16]
    with restored_values(x for x, _ in rounded):
        for tensor, value in rounded:
            tensor.copy_(value)
        yield


def stored_floats(
    integers: Mapping[str, IntegerLayer],
    floats: Mapping[str, torch.Tensor],
    float_dtype: str,
) -> dict[str, torch.Tensor]:
    """Returns the floats of a file, the biases of integer layers included."""
    biases = {
        f"{name}.bias": layer.bias
        for name, layer in integers.items()
        if layer.bias is not None
    }
    rows = {**floats, **biases}
    return {name: stored_float(x, float_dtype) for name, x in rows.items()}


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a stored tensor as it is loaded: floats in float32."""
    return tensor.float() if tensor.is_floating_point() else tensor
