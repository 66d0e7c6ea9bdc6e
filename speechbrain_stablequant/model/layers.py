"""Finds the quantizable layers of a model and groups them into units.

A *layer* is a weight and its input, whatever module holds them: a Linear, a
Conv1d, a Conv2d or rows of an attention's weight (see :mod:`.products`). A
*unit* is what the search treats as one: each feature-extractor convolution,
the feature projection, the positional convolution, each transformer block, the
head. In other models items of a ``ModuleList`` of like modules are blocks, and
any other layer is a unit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn

from . import products
from .encoders import Encoder, find_encoders
from .layer import HEAD, KINDS, Layer, layer_kind, pads_otherwise

# Child whose product is recurrent, by class.
_RECURRENT = {
    "speechbrain.nnet.RNN.LiGRU_Layer": "u",
    "speechbrain.nnet.RNN.SLiGRU_Layer": "u",
}
#: Weights of no layer that are fewer stay float: they would save nothing.
LEAST_WEIGHTS = 1 << 14


def _wanted(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    chosen, left_out = (
        any(fnmatchcase(name, pattern) for pattern in patterns)
        for patterns in (include, exclude)
    )
    return chosen and not left_out


def _selected(
    found: Mapping[str, nn.Module],
    include: Sequence[str],
    exclude: Sequence[str],
) -> dict[str, nn.Module]:
    """Applies the patterns; raises if one matches nothing, or none is left."""
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in found):
                raise ValueError(
                    f"quantize.{key}: pattern '{pattern}' matches no layer; "
                    f"layers are named like '{next(iter(found))}'"
                )
    kept = {n: m for n, m in found.items() if _wanted(n, include, exclude)}
    if not kept:
        key, patterns = ("exclude", exclude) if include else ("include", [])
        raise ValueError(
            f"quantize.{key}: {list(patterns)} leaves no layer to quantize"
        )
    return kept


def find_layers(
    modules: Mapping[str, nn.Module],
    target: Sequence[str],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> list[Layer]:
    """Finds every layer below the target keys, in network order; raises
    ValueError for one that cannot be quantized."""
    for key in target:
        if key not in modules:
            raise ValueError(
                f"quantize.target: '{key}' is not a key of the recipe's "
                f"`modules`; they are {', '.join(modules)}"
            )
    # A model behind two keys (hf_ctc.lm_head and ctc_lin) is listed once.
    found: dict[nn.Module, str] = {}
    encoders = find_encoders({key: modules[key] for key in target})
    left_out = _idle(encoders)
    for key in target:
        for name, module in products.named_modules(modules[key], key):
            left_out |= {module.get_submodule(n) for n in _recurrent(module)}
            if module not in left_out and layer_kind(module) is not None:
                found.setdefault(module, name)
    if not found:
        raise ValueError(
            f"quantize.target: no layer to quantize below {list(target)}; "
            "name the keys of `modules` that hold the recognizer"
        )
    # What multiplies its owner's output comes after all of its children.
    by_place = sorted(found, key=lambda x: getattr(x, "tied", False))
    named = {found[module]: module for module in by_place}
    kept = _selected(named, include, exclude)
    _refuse_others(kept)
    targets = {key: modules[key] for key in target}
    by_name, blocks = products.modules_by_name(targets), _blocks(targets)
    layers = [
        Layer(
            name,
            module,
            layer_kind(module),
            _unit(name, encoders, blocks),
            products.owners_of(name, by_name),
        )
        for name, module in kept.items()
    ]
    return _network_order(layers, encoders)


def _recurrent(module: nn.Module) -> list[str]:
    """Names of the children that a recurrent module calls at each step."""
    known = map(_RECURRENT.get, products.class_names(module))
    return [name for name in known if name]


def weight_only_parameters(
    modules: Mapping[str, nn.Module],
    target: Sequence[str],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Weights that are stored as integers and multiplied in floating point:
    recurrent ones, whose steps depend on each other, and embeddings.

    Names in the state dict, each parameter once; patterns as for layers.
    """
    found: dict[nn.Parameter, str] = {}
    for key in target:
        for path, module in modules[key].named_modules(prefix=key):
            for name in weight_only_names(module):
                full, weight = f"{path}.{name}", module.get_parameter(name)
                wanted = _wanted(full, include, exclude)
                if wanted and weight.numel() >= LEAST_WEIGHTS:
                    found.setdefault(weight, full)
    return list(found.values())


def weight_only_names(module: nn.Module) -> Iterator[str]:
    """Names of weights of recurrent steps, or of an embedding."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        for name, _ in module.named_parameters(recurse=False):
            if name.startswith("weight_"):
                yield name
    elif isinstance(module, nn.Embedding):
        yield "weight"
    else:
        yield from (f"{name}.weight" for name in _recurrent(module))


def _idle(encoders: Iterable[Encoder]) -> set[nn.Module]:
    """The positional convolution of Conformers is made and never called."""
    return {
        child
        for encoder in encoders
        if any(hasattr(b, "conv_module") for b in encoder.model.encoder.layers)
        for child in encoder.model.encoder.pos_conv_embed.modules()
    }


def _refuse_others(layers: Mapping[str, nn.Module]) -> None:
    known = {kind.forward for kind in KINDS}
    for name, module in layers.items():
        if type(module).forward not in known or "forward" in vars(module):
            raise ValueError(
                f"{name}: {type(module).__name__} has a forward of its own "
                "and cannot be quantized; put it in quantize.exclude"
            )
        if pads_otherwise(module):
            raise ValueError(
                f"{name}: {type(module).__name__} with padding "
                f"{module.padding!r}, mode {module.padding_mode!r} has no "
                "integer form; put it in quantize.exclude"
            )


def _blocks(modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the items of each list of like modules."""
    return {
        f"{path}.{i}"
        for path, found in products.modules_by_name(modules).items()
        if isinstance(found, nn.ModuleList)
        and len(found) > 1
        and len(set(map(type, found))) == 1
        for i in range(len(found))
    }


def _unit(name: str, encoders: Sequence[Encoder], blocks: set[str]) -> str:
    for encoder in encoders:
        unit = encoder.unit_of(name)
        if unit is not None:
            return f"{encoder.key}.{unit}" if len(encoders) > 1 else unit
    paths = accumulate(name.split("."), "{}.{}".format)
    block = next((path for path in paths if path in blocks), None)
    return block or (HEAD if encoders else name)


def _network_order(
    layers: list[Layer], encoders: Sequence[Encoder]
) -> list[Layer]:
    """The positional convolution is declared out of order."""
    if len(encoders) != 1:
        return layers
    order = {"conv": 0, "projection": 1, "pos_conv": 2, "block": 3, HEAD: 5}

    def rank(layer: Layer) -> tuple[int, int]:
        stem, _, index = layer.unit.partition(".")
        known = stem in order and index.isdigit()
        return order.get(stem, 4), int(index) if known else 0

    return sorted(layers, key=rank)


def visible_layers(layers: Iterable[Layer]) -> AbstractContextManager[None]:
    """Context in which layers are called, see :func:`.products.visible`."""
    return products.visible(x for layer in layers for x in layer.owners)


def group_units(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    units: dict[str, list[Layer]] = {}
    for layer in layers:
        units.setdefault(layer.unit, []).append(layer)
    return units


def layer_names(
    layers: Iterable[Layer], modules: Iterable[nn.Module]
) -> set[str]:
    """Names of the layers of some modules."""
    wanted = set(modules)
    return {layer.name for layer in layers if layer.module in wanted}
