"""Weights that are stored as integers and multiplied in floating point:
recurrent ones, whose every step depends on the one before, and embeddings."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from .products import class_names

#: Smaller ones stay float: they would save nothing.
_LEAST = 1 << 14

#: Child whose product is recurrent, by class.
_RECURRENT = {
    "speechbrain.nnet.RNN.LiGRU_Layer": "u",
    "speechbrain.nnet.RNN.SLiGRU_Layer": "u",
}


def recurrent_linear(module: nn.Module) -> nn.Module | None:
    """The Linear of a recurrent module that is called at each step."""
    known = (_RECURRENT.get(name) for name in class_names(module))
    return next((getattr(module, name) for name in known if name), None)


def _weights(module: nn.Module) -> Iterator[str]:
    """Names of a module's weights that are stored as integers."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        for name, _ in module.named_parameters(recurse=False):
            if name.startswith("weight_"):
                yield name
    elif isinstance(module, nn.Embedding):
        yield "weight"
    else:
        for name in filter(None, map(_RECURRENT.get, class_names(module))):
            yield f"{name}.weight"


def weight_only_parameters(
    modules: Mapping[str, nn.Module],
    target: Sequence[str],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Names in the state dict, each parameter once; ``include`` and
    ``exclude`` as for layers."""

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    found: dict[nn.Parameter, str] = {}
    for key in target:
        for path, module in modules[key].named_modules(prefix=key):
            for name in _weights(module):
                full, weight = f"{path}.{name}", module.get_parameter(name)
                wanted = matches(full, include) and not matches(full, exclude)
                if wanted and weight.numel() >= _LEAST:
                    found.setdefault(weight, full)
    return list(found.values())
