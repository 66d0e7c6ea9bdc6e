"""The description of a recognizer apart from its weights: ``recognizer.json``.

``hyperparams.yaml`` says the same to SpeechBrain, in tags that are executed. A
folder of an earlier version is described by its YAML, which is read as text:
any tag but ours is an error.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..utils.files import plain_name, read_file, read_json
from ..utils.typed import one_line, short, typed
from ..utils.yaml_tree import Tagged, parse_yaml
from .errors import CheckpointError
from .module_tree import Node, build_module, node_of_json, node_of_yaml

RECOGNIZER_FILE = "recognizer.json"
HYPERPARAMS_FILE = "hyperparams.yaml"
SPEC_FORMAT = 1

#: Tokenizer classes by their names in files.
TOKENIZERS = {
    "labels": "speechbrain.dataio.encoder.CTCTextEncoder",
    "sentencepiece": "sentencepiece.SentencePieceProcessor",
}
_RECOGNIZER = "new:speechbrain_stablequant.inference.QuantizedRecogniser"
_LOADER = "new:speechbrain_stablequant.inference.FolderLoader"
_DECODER = "name:speechbrain.decoders.ctc_greedy_decode"
_NORMALIZER = "new:speechbrain.dataio.preprocess.AudioNormalizer"
_MAX_RATE = 1_000_000
_MAX_INDEX = 1 << 20
_MAX_KEY = 100


@dataclass(frozen=True)
class EncoderSettings:
    """How the encoder is called, apart from its configuration.

    ``use_lengths`` says whether the recipe passes relative lengths; the last
    three are settings of SpeechBrain's wrapper.
    """

    key: str
    use_lengths: bool
    normalize_wav: bool
    output_norm: bool
    output_all_hiddens: bool = False


@dataclass(frozen=True)
class RecognizerSpec:
    """A recognizer apart from its weights.

    ``heads`` are the modules behind the encoder, in order; ``checksum`` is that
    of the weights, or None where the description's own file is signed.
    """

    encoder: EncoderSettings
    heads: Mapping[str, Node]
    tokenizer: Literal["labels", "sentencepiece"]
    tokenizer_file: str
    blank_index: int
    sample_rate: int
    backend: str = "auto"
    backend_options: dict = field(default_factory=dict)
    checksum: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of ``recognizer.json``."""
        return {
            "format": SPEC_FORMAT,
            "encoder": asdict(self.encoder),
            "heads": [
                {"key": key, **node.to_dict()}
                for key, node in self.heads.items()
            ],
            "tokenizer": self.tokenizer,
            "tokenizer_file": self.tokenizer_file,
            "blank_index": self.blank_index,
            "sample_rate": self.sample_rate,
            "backend": self.backend,
            "backend_options": dict(self.backend_options),
        }

    def build_heads(self) -> dict[str, nn.Module]:
        """Builds the modules behind the encoder without storage."""
        return {
            key: build_module(node, f"heads.{key}")
            for key, node in self.heads.items()
        }


def read_spec(folder: Path) -> tuple[RecognizerSpec, str]:
    """Reads a folder's description and returns it with the name of its file."""
    path = folder / RECOGNIZER_FILE
    read = _read_json
    if not path.exists():
        path, read = folder / HYPERPARAMS_FILE, _read_yaml
    try:
        return read(path), path.name
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: there is no such file; the run that wrote the folder "
            "says in its report why it has no recognizer"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error})"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: describes no recognizer that is made from data alone "
            f"({one_line(error, 400)}); copy or make the folder again"
        ) from error


def _read_json(path: Path) -> RecognizerSpec:
    raw = typed(read_json(path, "recognizer"), dict, "recognizer")
    if raw.pop("format", None) != SPEC_FORMAT:
        raise ValueError(f"its format is not {SPEC_FORMAT}")
    heads: dict[str, Node] = {}
    for i, row in enumerate(typed(raw.pop("heads", None), list, "heads")):
        rows = typed(row, dict, f"heads[{i}]")
        key = _check_key(rows.pop("key", None), heads)
        heads[key] = node_of_json(rows, f"heads.{key}")
    return _checked({**raw, "checksum": None}, heads)


def _read_yaml(path: Path) -> RecognizerSpec:
    """Reads our own ``hyperparams.yaml`` and refuses everything else."""
    raw = typed(parse_yaml(read_file(path).decode("utf-8")), dict, "it")
    encoder = _tagged(raw, "encoder", _RECOGNIZER)
    loader = _tagged(raw, "pretrainer", _LOADER)
    _refers(_tagged(raw, "decoding_function", _DECODER), "blank_id", raw)
    _refers(_tagged(raw, "audio_normalizer", _NORMALIZER), "sample_rate", raw)
    heads: dict[str, Node] = {}
    for name, value in typed(encoder.get("heads"), dict, "heads").items():
        key = _check_key(name, heads)
        heads[key] = node_of_yaml(value, f"heads.{key}")
    tokenizer = raw.get("tokenizer")
    names = {f"new:{kind}": name for name, kind in TOKENIZERS.items()}
    tag = tokenizer.tag if isinstance(tokenizer, Tagged) else None
    if tag not in names:
        raise ValueError(f"tokenizer: cannot be {short(tokenizer)}")
    rows = {
        "encoder": encoder.get("encoder"),
        "heads": {},
        "tokenizer": names[tag],
        "tokenizer_file": loader.get("tokenizer_file"),
        "blank_index": raw.get("blank_index"),
        "sample_rate": raw.get("sample_rate"),
        "backend": raw.get("backend", "auto"),
        "backend_options": raw.get("backend_options", {}),
        "checksum": typed(encoder.get("checksum"), str, "checksum"),
    }
    return _checked(rows, heads)


def _check_key(key: Any, others: Mapping[str, Node]) -> str:
    """Checks a key, which names modules and tensors."""
    name = typed(key, str, "key of a module")
    good = name.isprintable() and 0 < len(name) <= _MAX_KEY and "." not in name
    if not good or name in others or hasattr(nn.ModuleDict, name):
        raise ValueError(f"a module cannot have the key {short(name)}")
    return name


def _tagged(raw: Mapping[str, Any], key: str, tag: str) -> dict:
    """Returns the value behind a tag, which must be this one."""
    value = raw.get(key)
    if not isinstance(value, Tagged) or value.tag != tag:
        raise ValueError(f"{key}: must be !{tag}, not {short(value)}")
    return typed(value.value, dict, key)


_REFERENCES = {"blank_id": "blank_index", "sample_rate": "sample_rate"}


def _refers(settings: Mapping, key: str, raw: Mapping) -> None:
    """Checks that a setting is the file's value for it."""
    name = _REFERENCES[key]
    value = settings.get(key)
    known = (Tagged("ref", f"<{name}>"), raw.get(name))
    if set(settings) != {key} or value not in known:
        raise ValueError(f"{key}: must be !ref <{name}>, not {short(settings)}")


def _checked(
    raw: Mapping[str, Any], heads: Mapping[str, Node]
) -> RecognizerSpec:
    """Returns a description after checking its values."""
    found = typed({**raw, "heads": {}}, RecognizerSpec, "the recognizer")
    spec = replace(found, heads=heads)
    plain_name(spec.tokenizer_file)
    checks = {
        "blank_index": abs(spec.blank_index) < _MAX_INDEX,
        "sample_rate": 0 < spec.sample_rate <= _MAX_RATE,
    }
    for key, good in checks.items():
        if not good:
            raise ValueError(f"{key}: cannot be {short(getattr(spec, key))}")
    _check_key(spec.encoder.key, heads)
    return spec
