"""YAML nodes that rebuild the heads of a recognizer."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import ruamel.yaml
import speechbrain as sb
from speechbrain.nnet.linear import Linear as SpeechBrainLinear
from torch import nn

from ..folder.recognizer_spec import HYPERPARAMS_FILE

# Constructor arguments of plain modules.
_ARGUMENTS = {
    nn.Identity: (),
    nn.Linear: ("in_features", "out_features"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.BatchNorm1d: ("num_features", "eps", "affine"),
    nn.Dropout: ("p",),
    nn.ReLU: (),
    nn.LeakyReLU: ("negative_slope",),
    nn.GELU: ("approximate",),
    nn.SiLU: (),
    nn.Tanh: (),
    nn.LogSoftmax: ("dim",),
}


def plain_node(module: nn.Module, indent: str = "  ") -> str | None:
    """YAML node (``!new:...``) of a plain module; None for other classes."""
    kind = type(module)
    if kind is nn.Sequential:
        nodes = [plain_node(child, f"{indent}  ") for child in module]
        if None in nodes or not nodes:
            return None
        return _block("torch.nn.Sequential", [f"- {n}" for n in nodes], indent)
    if kind is SpeechBrainLinear:
        name = "speechbrain.nnet.linear.Linear"
        settings = {
            "input_size": module.w.in_features,
            "n_neurons": module.w.out_features,
            "bias": module.w.bias is not None,
            "combine_dims": module.combine_dims,
        }
    elif kind in _ARGUMENTS:
        name = f"torch.nn.{kind.__name__}"
        settings = {key: getattr(module, key) for key in _ARGUMENTS[kind]}
        if kind in (nn.Linear, nn.LayerNorm):
            settings["bias"] = module.bias is not None
    else:
        return None
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    return _block(name, lines, indent)


def _block(name: str, lines: list[str], indent: str) -> str:
    if not lines:
        return f"!new:{name} {{}}"
    return f"!new:{name}" + "".join(f"\n{indent}{line}" for line in lines)


def recipe_nodes(brain: sb.Brain) -> dict[str, Any]:
    """``!new:`` nodes of a recipe's modules, by key.

    Read from the YAML in its output folder, where SpeechBrain has resolved
    overrides and references.
    """
    folder = getattr(brain.hparams, "output_folder", None)
    path = Path(str(folder)) / HYPERPARAMS_FILE
    if folder is None or not path.is_file():
        return {}
    nodes = (ruamel.yaml.YAML().load(path) or {}).get("modules") or {}
    return {
        key: node
        for key, node in nodes.items()
        if tag_of(node).startswith("!new:") and not makes_calls(node)
    }


def tag_of(node: Any) -> str:
    return getattr(getattr(node, "tag", None), "value", None) or ""


def makes_calls(node: Any) -> bool:
    """Whether a node calls a function, which a folder must not do."""
    if tag_of(node).startswith("!apply"):
        return True
    if isinstance(node, dict):
        return any(makes_calls(value) for value in node.values())
    return isinstance(node, list) and any(makes_calls(value) for value in node)


def node_text(key: str, node: Any) -> str:
    """YAML text of a recipe's node."""
    out = io.StringIO()
    # A copy has no anchors that other nodes refer to.
    ruamel.yaml.YAML().dump({key: copy.deepcopy(node)}, out)
    return out.getvalue()
