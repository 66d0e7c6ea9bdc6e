"""The modules behind an encoder as data, rebuilt without running code.

Only listed classes are built, with plain settings: a file can choose layers and
their sizes and nothing else.
"""

import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..utils.patching import on_meta
from ..utils.typed import inside, one_line, short, typed
from ..utils.yaml_tree import Tagged

_TORCH = (
    *("Identity", "Linear", "Sequential", "Dropout", "Conv1d"),
    *("LayerNorm", "BatchNorm1d", "GroupNorm"),
    *("ReLU", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU", "Mish"),
    *("Tanh", "Sigmoid", "Hardtanh", "Softmax", "LogSoftmax"),
)
_SPEECHBRAIN = (
    "lobes.models.VanillaNN.VanillaNN",
    "nnet.RNN.GRU",
    "nnet.RNN.LSTM",
    "nnet.RNN.RNN",
    "nnet.activations.Softmax",
    "nnet.activations.Swish",
    "nnet.containers.LengthsCapableSequential",
    "nnet.containers.Sequential",
    "nnet.dropout.Dropout2d",
    "nnet.linear.Linear",
    "nnet.normalization.BatchNorm1d",
    "nnet.normalization.LayerNorm",
)
#: Full names of the classes that may be built.
KINDS = frozenset(
    [
        *(f"torch.nn.{name}" for name in _TORCH),
        *(f"speechbrain.{name}" for name in _SPEECHBRAIN),
    ]
)

_MAX_SIZE = 1 << 20
_MAX_ITEMS = 256
# Settings that repeat something.
_COUNTS = ("dnn_blocks", "num_layers")
_MAX_COUNT = 256
# Settings that a file must not decide.
_REFUSED = ("device", "dtype")


@dataclass(frozen=True)
class Node:
    """A module as data, or a class with its settings if not ``made``."""

    kind: str
    args: tuple = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    made: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Returns the node as JSON."""
        row: dict[str, Any] = {"new" if self.made else "name": self.kind}
        if self.args:
            row["args"] = [_to_json(value) for value in self.args]
        if self.settings:
            row["settings"] = {k: _to_json(v) for k, v in self.settings.items()}
        return row


def _to_json(value: Any) -> Any:
    if isinstance(value, Node):
        return value.to_dict()
    return [_to_json(v) for v in value] if isinstance(value, list) else value


def node_of_json(raw: Any, where: str) -> Node:
    """Reads what :meth:`Node.to_dict` wrote; ``where`` opens the error."""
    rows = typed(raw, dict, where)
    (verb,) = {"new", "name"} & set(rows) or (None,)
    if verb is None or set(rows) - {verb, "args", "settings"}:
        raise ValueError(f"{where}: is no module but {short(raw)}")
    kind = typed(rows[verb], str, f"{where}.{verb}")
    args = typed(rows.get("args", []), list, f"{where}.args")
    settings = typed(rows.get("settings", {}), dict, f"{where}.settings")
    return _node(kind, args, settings, verb == "new", where)


def node_of_yaml(value: Any, where: str) -> Node:
    """Converts a node of HyperPyYAML, such as ``!new:torch.nn.ReLU``."""
    tag = value.tag if isinstance(value, Tagged) else ""
    verb, _, kind = tag.partition(":")
    if verb not in ("new", "name"):
        raise ValueError(f"{where}: is no module but {short(value)}")
    content = value.value
    args = content if isinstance(content, list) else []
    settings = content if isinstance(content, dict) else {}
    if content not in ("", args, settings):
        raise ValueError(f"{where}: has the settings {short(content)}")
    return _node(kind, args, settings, verb == "new", where)


def _node(
    kind: str, args: list, settings: dict, made: bool, where: str
) -> Node:
    if len(settings) > _MAX_ITEMS:
        raise ValueError(f"{where}: has more than {_MAX_ITEMS} settings")
    named = {k: _value(v, inside(where, k)) for k, v in settings.items()}
    return Node(kind, tuple(_value(args, where)), named, made)


def _value(raw: Any, where: str) -> Any:
    """Checks a setting; parsers limit how deeply it can be nested."""
    if isinstance(raw, dict):
        return node_of_json(raw, where)
    if isinstance(raw, Tagged):
        return node_of_yaml(raw, where)
    if isinstance(raw, list):
        if len(raw) > _MAX_ITEMS:
            raise ValueError(f"{where}: has more than {_MAX_ITEMS} items")
        return [_value(v, f"{where}[{i}]") for i, v in enumerate(raw)]
    plain = typed(raw, bool | int | float | str | None, where)
    size = plain if isinstance(plain, int | float) else 0
    if abs(size) > _MAX_SIZE or len(str(plain)) > _MAX_ITEMS:
        raise ValueError(f"{where}: cannot be {short(plain)}")
    return plain


# -- building --------------------------------------------------------------


def build_module(node: Node, where: str) -> nn.Module:
    """Builds a module on the ``meta`` device, in evaluation mode."""
    if not node.made:
        raise ValueError(f"{where}: is the class {one_line(node.kind)} alone")
    with on_meta():
        module = _build(node, where)
    return module.eval()


def _build(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_build(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, Node):
        return value
    kind = _kind(value.kind, where)
    args = _build(list(value.args), where)
    settings = {
        name: _build(v, inside(where, name))
        for name, v in value.settings.items()
    }
    # Check names before positions, for a better message.
    _check_settings(settings, where)
    try:
        named = inspect.signature(kind).bind_partial(*args, **settings)
    except TypeError as error:
        raise ValueError(f"{where}: {one_line(error)}") from error
    _check_settings(named.arguments, where)
    if not value.made:
        plain = not (args or settings)
        return kind if plain else functools.partial(kind, *args, **settings)
    try:
        return kind(*args, **settings)
    except Exception as error:
        # A third-party class may raise anything.
        raise ValueError(
            f"{where}: {value.kind} does not take its settings "
            f"({one_line(error)})"
        ) from error


def _kind(name: str, where: str) -> type[nn.Module]:
    if name not in KINDS:
        raise ValueError(
            f"{where}: {one_line(name)} is none of the kinds of modules that "
            "are made from data alone; if you trust the folder, load it with "
            "SpeechBrain's EncoderASR.from_hparams, which runs the code that "
            "it names"
        )
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), kind)


def _check_settings(settings: Mapping[str, Any], where: str) -> None:
    for name, value in settings.items():
        if name in _REFUSED:
            raise ValueError(f"{inside(where, name)}: a file may not set it")
        if name in _COUNTS and not (
            isinstance(value, int) and 0 <= value <= _MAX_COUNT
        ):
            raise ValueError(f"{inside(where, name)}: cannot be {short(value)}")
