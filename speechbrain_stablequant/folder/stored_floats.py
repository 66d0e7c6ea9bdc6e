"""What stays floating point in a quantized model: how it is stored, and given
to modules again."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..core.affine import dequantize, quantize, weight_scale
from ..core.integer_layer import IntegerLayer, in_integers, layer_geometry
from ..model import products
from ..model.layer import layer_kind
from ..model.products import covered_parameters, tied_parameters
from ..model.rotation import attach_rotations, rotation_of
from ..runtimes.forwards import find_modules
from ..runtimes.simulated import make_layer
from ..utils.patching import restored_values, shadowed_forwards
from ..utils.typed import one_line
from .errors import CheckpointError, reading

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
    found = find_modules(modules, alone)
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
