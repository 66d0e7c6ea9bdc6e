"""Nodes of a recipe's YAML, for the inference YAML of its folder."""

import copy
import io
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ruamel.yaml
import speechbrain as sb
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.tag import Tag
from speechbrain.nnet.linear import Linear as SpeechBrainLinear
from torch import nn

from ..folder.errors import NoFolderError
from ..folder.recognizer_spec import HYPERPARAMS_FILE

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


def recipe_tree(brain: sb.Brain) -> Any:
    """The YAML in a recipe's output folder, None if there is none. SpeechBrain
    has resolved its references: nodes that are one object are the same here."""
    folder = getattr(brain.hparams, "output_folder", None)
    path = Path(str(folder)) / HYPERPARAMS_FILE
    if folder is None or not path.is_file():
        return None
    return ruamel.yaml.YAML().load(path) or {}


def dumped(tree: Mapping[str, Any]) -> str:
    """The text of a tree."""
    out = io.StringIO()
    ruamel.yaml.YAML().dump(dict(tree), out)
    return out.getvalue()


def tag_of(node: Any) -> str:
    return getattr(getattr(node, "tag", None), "value", None) or ""


def parts_of(node: Any) -> Iterator[Any]:
    """A node and all inside of it."""
    yield node
    items = node.values() if isinstance(node, dict) else node
    if isinstance(node, dict | list):
        for item in items:
            yield from parts_of(item)


def makes_calls(node: Any) -> bool:
    """Whether a node calls a function, which a folder must not do."""
    return any(tag_of(part).startswith("!apply") for part in parts_of(node))


def plain_node(module: nn.Module) -> Any:
    """The node of a plain module; None for other classes."""
    kind = type(module)
    if kind is nn.Sequential:
        nodes = [plain_node(child) for child in module]
        known = nodes and None not in nodes
        return tagged("!new:torch.nn.Sequential", nodes) if known else None
    if kind is SpeechBrainLinear:
        settings = {
            "input_size": module.w.in_features,
            "n_neurons": module.w.out_features,
            "bias": module.w.bias is not None,
            "combine_dims": module.combine_dims,
        }
        return tagged("!new:speechbrain.nnet.linear.Linear", settings)
    if kind not in _ARGUMENTS:
        return None
    settings = {key: getattr(module, key) for key in _ARGUMENTS[kind]}
    if kind in (nn.Linear, nn.LayerNorm):
        settings["bias"] = module.bias is not None
    return tagged(f"!new:torch.nn.{kind.__name__}", settings)


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


def tagged(tag: str, rows: Mapping[str, Any] | Sequence[Any]) -> Any:
    """A node with a tag, such as ``!new:...``."""
    kind = CommentedMap if isinstance(rows, Mapping) else CommentedSeq
    made = kind(rows)
    made.yaml_set_ctag(Tag(suffix=tag))
    return made


def huggingface_files(wrapper: nn.Module) -> dict[str, bytes]:
    """What makes a wrapper of HuggingFace again, apart from weights."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("feature_extractor", "tokenizer"):
            part = getattr(wrapper, name, None)
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)
        files = {
            path.name: path.read_bytes()
            for path in sorted(Path(folder).iterdir())
            if path.is_file()
        }
    # Of Whisper's tokenizer, which does not save it.
    spelling = getattr(
        getattr(wrapper, "tokenizer", None), "english_spelling_normalizer", None
    )
    if spelling is not None:
        files["normalizer.json"] = json.dumps(spelling, indent=1).encode()
    config = wrapper.model.config.to_json_string(use_diff=False)
    files["config.json"] = config.encode()
    for name, content in files.items():
        if name.endswith(".json"):
            rows = json.loads(content)
            # A folder does not reveal where its model came from.
            for key in ("_name_or_path", "name_or_path"):
                if isinstance(rows, dict) and rows.pop(key, None) is not None:
                    text = json.dumps(rows, indent=1, ensure_ascii=False)
                    files[name] = text.encode()
    return files
