"""Nodes of a recipe's YAML, copied into an inference YAML."""

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ruamel.yaml
import speechbrain as sb
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.tag import Tag

from ..folder.recognizer_spec import HYPERPARAMS_FILE
from .errors import NoFolderError
from .head_yaml import makes_calls, tag_of

OURS = "!new:speechbrain_stablequant.inference"
# Keys that SpeechBrain's classes, or our folders, give a meaning.
_RESERVED = (
    *("encoder", "decoder", "decoding_function", "tokenizer", "modules"),
    *("pretrainer", "backend", "backend_options", "audio_normalizer"),
    *("sample_rate", "test_beam_search", "language"),
    *("transducer_beam_search", "transformer_beam_search"),
)
# Settings of a HuggingFace wrapper that say where its model comes from.
PLACES = ("source", "save_path", "cache_dir", "device")


def recipe_tree(brain: sb.Brain) -> Any:
    """The YAML in a recipe's output folder, whose references SpeechBrain has
    resolved: nodes that are one object are the same here."""
    folder = getattr(brain.hparams, "output_folder", None)
    path = Path(str(folder)) / HYPERPARAMS_FILE
    if folder is None or not path.is_file():
        raise NoFolderError(
            "there is no hyperparams.yaml in the recipe's output_folder to "
            "generate an inference YAML from; give quantize.inference"
        )
    return ruamel.yaml.YAML().load(path) or {}


class Nodes:
    """Copies nodes of a recipe, each once.

    SpeechBrain's HuggingFace wrappers fetch a model when they are made. These,
    and what is made from them, become ``LateModule``.
    """

    def __init__(self, tree: Mapping[str, Any], fetching: Collection[str]):
        modules = tree.get("modules") or {}
        # What stands only in `modules` gets a key.
        self._nodes = {**modules, **tree}
        self._fetching = fetching
        self._keys: dict[int, str] = {}
        for key, node in {**tree, **modules}.items():
            if tag_of(node).startswith("!new:"):
                self._keys.setdefault(id(node), key)
        #: The copies, what others refer to first.
        self.out: dict[str, Any] = {}
        #: Keys of late modules.
        self.late: list[str] = []

    def add(self, key: str) -> str:
        """Copies the node of a key, and those that it refers to; returns its
        key in the copy."""
        node, name = self._nodes.get(key), self.key_of(key)
        if name in self.out:
            return name
        if not tag_of(node).startswith("!new:"):
            raise NoFolderError(
                f"'{key}' has no `!new:` node in the recipe's YAML; give "
                "quantize.inference"
            )
        if makes_calls(node):
            raise NoFolderError(
                f"'{key}' of the recipe's YAML calls something (!apply), which "
                "a folder must not do; give quantize.inference"
            )
        used: list[str] = []
        made = self._copied(node, node, used)
        fetches = key in self._fetching or name in self._fetching
        if fetches or set(used) & set(self.late):
            made = late_node(made, fetches)
            self.late.append(name)
        self.out[name] = made
        return name

    def key_of(self, key: str) -> str:
        """The key that a node has in the copy."""
        key = self._keys.get(id(self._nodes.get(key)), key)
        return f"{key}_" if key in _RESERVED else key

    def _copied(self, node: Any, top: Any, used: list[str]) -> Any:
        key = self._keys.get(id(node))
        if key is not None and node is not top:
            used.append(self.add(key))
            return reference(used[-1])
        if isinstance(node, CommentedMap):
            rows = {k: self._copied(v, top, used) for k, v in node.items()}
            made: Any = CommentedMap(rows)
        elif isinstance(node, CommentedSeq):
            made = CommentedSeq([self._copied(v, top, used) for v in node])
            made.fa.set_flow_style()
        elif isinstance(node, TaggedScalar):
            return TaggedScalar(node.value, node.style, node.tag)
        else:
            return copy.copy(node)
        if tag_of(node):
            made.yaml_set_ctag(node.tag)
        return made


def reference(key: str) -> TaggedScalar:
    """A ``!ref`` to a key."""
    return TaggedScalar(f"<{key}>", None, Tag(suffix="!ref"))


def late_node(node: Any, fetches: bool) -> Any:
    """A node that is made when a folder's files are there; of one that
    ``fetches`` without where from."""
    rows: dict[str, Any] = {"kind": tag_of(node).removeprefix("!new:")}
    if isinstance(node, CommentedSeq):
        rows["args"] = CommentedSeq(node)
    elif isinstance(node, CommentedMap):
        gone = PLACES if fetches else ()
        rows["settings"] = CommentedMap(
            {k: v for k, v in node.items() if k not in gone}
        )
    return tagged(f"{OURS}.LateModule", rows)


def tagged(tag: str, rows: Mapping[str, Any]) -> CommentedMap:
    """A node with a tag, such as ``!new:...``."""
    made = CommentedMap(rows)
    made.yaml_set_ctag(Tag(suffix=tag))
    return made
