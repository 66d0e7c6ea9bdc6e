"""What stays floating point in a quantized model, and how it is stored."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..core.affine import dequantize, quantize, weight_scale
from ..core.integer_layer import IntegerLayer
from ..model.products import covered_parameters, tied_parameters
from ..runtimes.base import modules_by_name
from ..runtimes.simulated import make_layer
from ..utils.patching import restored_values, shadowed_forwards
from .errors import CheckpointError

# Relative to a tensor's largest value: the rounding error of half precision.
_HALF_ERROR = 2**-11

# Bits of weight-only parameters, and the ending of the name of their scales.
_BITS, _SCALE = 8, ".row_scale"


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


def _rows(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight-only parameter as int8 and the float32 scale of each row."""
    scale = weight_scale(tensor, _BITS, "max")
    return quantize(tensor, scale, _BITS).cpu(), scale.cpu()


@contextmanager
def rounded_floats(
    modules: Mapping[str, nn.Module],
    names: Collection[str],
    float_dtype: str,
    weight_only: Collection[str] = (),
) -> Iterator[None]:
    """Context in which modules have the values that are loaded later."""
    state = float_state(modules, names)
    rounded = {}
    for name, x in state.items():
        if name in weight_only:
            rounded[name] = dequantize(*_rows(x))
        elif (half := stored_float(x, float_dtype)).dtype == torch.float16:
            rounded[name] = half
    with restored_values(state[name] for name in rounded):
        for name, value in rounded.items():
            state[name].copy_(value)
        yield


@contextmanager
def rounded_weights(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> Iterator[None]:
    """Context in which weight-only layers compute with their integers, and
    embeddings look up rows of those that share their weight."""
    alone = {name: x for name, x in integers.items() if x.weight_only}
    tied = tied_parameters(modules, integers).values()
    alone |= {name: integers[name] for name in tied}
    found = modules_by_name(modules, alone)
    holders = nn.ModuleList(modules.values()).modules()
    uses = Counter(x for m in holders for x in m._parameters.values())
    filled, replaced = [], {}
    for name, module in found.items():
        # A parameter of two modules has two values in the file.
        if parametrize.is_parametrized(module, "weight") or any(
            uses[x] > 1 for x in module.parameters()
        ):
            replaced[module] = make_layer(alone[name])
        else:
            filled.append((module, alone[name]))
    parameters = (x for module, _ in filled for x in module.parameters())
    with restored_values(parameters), shadowed_forwards(replaced):
        with torch.no_grad():
            for module, layer in filled:
                module.weight.copy_(layer.float_weight())
                if layer.bias is not None and module.bias is not None:
                    module.bias.copy_(layer.bias)
        yield


def stored_floats(
    integers: Mapping[str, IntegerLayer],
    floats: Mapping[str, torch.Tensor],
    float_dtype: str,
    weight_only: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Returns the floats of a file, the biases of integer layers included;
    weight-only parameters as int8 with their scales."""
    biases = {f"{name}.bias": x.bias for name, x in integers.items()}
    rows = {**floats, **{n: b for n, b in biases.items() if b is not None}}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in rows.items():
        if name in weight_only:
            stored[name], stored[f"{name}{_SCALE}"] = _rows(tensor)
        else:
            stored[name] = stored_float(tensor, float_dtype)
    return stored


def loaded_floats(
    names: Collection[str], read: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The inverse of :func:`stored_floats`, in float32; raises ValueError for
    integers without scales that fit."""
    scales = {
        name: name.removesuffix(_SCALE)
        for name in names
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in names
    }
    floats = {}
    for name in names:
        if name not in scales:
            x = read(name)
            floats[name] = x.float() if x.is_floating_point() else x
    for name, owner in scales.items():
        scale, x = read(name), floats[owner]
        fits = x.dtype == torch.int8 and scale.shape == x.shape[:1]
        if not fits or not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"'{name}' is no scale of '{owner}'")
        floats[owner] = dequantize(x, scale)
    return floats
