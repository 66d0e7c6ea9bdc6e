"""What can be said of a recipe before it is run: wrong keys of its block, and
checkpoints that are not there. Its YAML is read as data."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import speechbrain as sb
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hyperpyyaml import resolve_references
from ruamel.yaml import YAMLError

from ..utils.yaml_tree import Tagged, parse_yaml
from .block import read_block

_REGISTER = "apply:speechbrain_stablequant.register"
# Arguments that name a checkpoint, by what a tag begins or ends with.
_WRAPPERS = "new:speechbrain.integrations.huggingface."
_LOADERS = ".from_pretrained"
# plus.budget.scores
_OPEN = ("scores",)
_CHECKPOINTS = ("source", "pretrained_model_name_or_path")


def check_recipe(arguments: Sequence[str]) -> None:
    """Raise for wrong keys or checkpoints of a recipe's command line, which
    follows its script.

    Nothing is said of a recipe that reads its command line in another way, or
    of a YAML that only HyperPyYAML understands: the recipe says it.
    """
    tree = _resolved(arguments)
    for node in tree.values():
        if not isinstance(node, Tagged) or node.tag != _REGISTER:
            continue
        whole = not any(
            isinstance(x, Tagged) for _, x in _parts(node.value, "")
        )
        if whole and isinstance(node.value, dict):
            read_block(_without_open(node.value))
    _check_checkpoints(tree, arguments[0])


def _without_open(node: Any) -> Any:
    """A copy without what a script may register before it reads its YAML."""
    if isinstance(node, list):
        return [_without_open(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: x for key, x in node.items() if key not in _OPEN}
    return {key: _without_open(x) for key, x in kept.items()}


def _resolved(arguments: Sequence[str]) -> dict[str, Any]:
    """The YAML of a command line with its options; empty if not readable."""
    try:
        with redirect_stderr(io.StringIO()):
            path, _, overrides = sb.parse_arguments(list(arguments))
        text = Path(path).read_text(encoding="utf-8")
        tree = parse_yaml(resolve_references(text, overrides).getvalue())
    except (KeyError, OSError, TypeError, ValueError, YAMLError, SystemExit):
        return {}
    return tree if isinstance(tree, dict) else {}


def _check_checkpoints(tree: Mapping[str, Any], file: str) -> None:
    for place, value in checkpoints(tree):
        if not _may_be_there(value):
            keys = [key for key, x in tree.items() if x == value]
            raise ValueError(
                f"{file}: {(keys or [place])[0]}: {value} is neither a folder "
                "nor an id of the HuggingFace Hub; correct it"
            )


def checkpoints(tree: Any) -> Iterator[tuple[str, str]]:
    """Place and name of each pretrained model that a YAML loads."""
    for place, node in _parts(tree, ""):
        if not isinstance(node, Tagged) or not isinstance(node.value, dict):
            continue
        if node.tag.startswith(_WRAPPERS) or node.tag.endswith(_LOADERS):
            for argument in _CHECKPOINTS:
                value = node.value.get(argument)
                if isinstance(value, str):
                    yield f"{place}.{argument}", value


def _may_be_there(checkpoint: str) -> bool:
    """Whether a checkpoint is on this machine, or may be on the Hub."""
    if Path(checkpoint).exists():
        return True
    try:
        validate_repo_id(checkpoint)
    except HFValidationError:
        return False
    return True


def _parts(node: Any, place: str) -> Iterator[tuple[str, Any]]:
    """A node and all in it, with dotted names."""
    yield place, node
    value = node.value if isinstance(node, Tagged) else node
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from _parts(item, f"{place}.{key}".lstrip("."))
