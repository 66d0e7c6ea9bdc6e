"""The description of a recognizer apart from its weights: ``recognizer.json``.

``hyperparams.yaml`` says the same to SpeechBrain, in tags that it executes.
Here it is read as text: to write ``recognizer.json``, and in folders of earlier
versions, which have it alone.
"""

import json
from collections.abc import Mapping, Set
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..core.plan import PLAN_FILE
from ..utils.files import parse_json, plain_name, read_file
from ..utils.typed import option, short, typed
from ..utils.yaml_tree import Tagged, parse_yaml
from .encoder_config import CONFIG_FILE
from .errors import CheckpointError, reading
from .module_tree import Node, build_module, node_of_json, node_of_yaml

RECOGNIZER_FILE = "recognizer.json"
HYPERPARAMS_FILE = "hyperparams.yaml"
SPEC_FORMAT = 1

# Names of tokenizers by their tags.
_TOKENIZERS = {
    "new:speechbrain.dataio.encoder.CTCTextEncoder": "labels",
    "new:sentencepiece.SentencePieceProcessor": "sentencepiece",
}
_RECOGNIZER = "new:speechbrain_stablequant.inference.QuantizedRecogniser"
_LOADER = "new:speechbrain_stablequant.inference.FolderLoader"
_MODULES_LOADER = "new:speechbrain_stablequant.inference.ModulesLoader"
_DECODER = "name:speechbrain.decoders.ctc_greedy_decode"
_NORMALIZER = "new:speechbrain.dataio.preprocess.AudioNormalizer"
_MAX_KEY = 100

#: Keys of `modules`, and of the YAML, that tell SpeechBrain's classes apart.
INTERFACES = {
    "WhisperASR": ({"whisper", "decoder"}, {"language", "sample_rate"}),
    "EncoderDecoderASR": ({"encoder", "decoder"}, {"tokenizer"}),
    "EncoderASR": ({"encoder"}, {"tokenizer", "decoding_function"}),
}


#: How a ``hyperparams.yaml`` of ours begins.
HEAD = """\
# A quantized speech recognizer, written by speechbrain_stablequant:
#
#   from speechbrain.inference.ASR import {interface}
#   asr = {interface}.from_hparams(source="this folder")
#   print(asr.transcribe_file("speech.flac"))
#
# The runtime is chosen by device; run_opts={{"device": "cuda"}} and
# overrides={{"backend": "torch"}} force one.
backend: {backend}
backend_options: {{}}

"""

_HYPERPARAMS = """\
sample_rate: {sample_rate}
blank_index: {blank_index}

encoder: !new:speechbrain_stablequant.inference.QuantizedRecogniser
    checksum: {checksum}
    encoder: {encoder}
    heads:{heads}
    backend: !ref <backend>
    options: !ref <backend_options>

modules:
    encoder: !ref <encoder>

tokenizer: !new:{tokenizer_class}

decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: !ref <blank_index>

audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
    sample_rate: !ref <sample_rate>

pretrainer: !new:speechbrain_stablequant.inference.FolderLoader
    recogniser: !ref <encoder>
    tokenizer: !ref <tokenizer>
    tokenizer_file: {tokenizer_file}
"""


@dataclass(frozen=True)
class EncoderSettings:
    """The encoder's key and wrapper, and whether it is given lengths."""

    key: str
    use_lengths: bool
    normalize_wav: bool
    output_norm: bool
    output_all_hiddens: bool = False


@dataclass(frozen=True)
class RecognizerSpec:
    """A recognizer apart from its weights.

    ``checksum`` is that of the weights, or None where this file is signed.
    """

    encoder: EncoderSettings
    heads: Mapping[str, Node]
    tokenizer: Literal["labels", "sentencepiece"]
    tokenizer_file: str
    blank_index: int = option(
        MISSING, lambda n: abs(n) < 1 << 20, "an output's index"
    )
    sample_rate: int = option(
        MISSING, lambda n: 0 < n <= 1_000_000, "from 1 to 1000000"
    )
    backend: str = "auto"
    backend_options: dict = field(default_factory=dict)
    checksum: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of ``recognizer.json``."""
        row = {"format": SPEC_FORMAT, **vars(self)}
        row["encoder"] = vars(self.encoder)
        row["heads"] = [
            {"key": key, **node.to_dict()} for key, node in self.heads.items()
        ]
        del row["checksum"]
        return row

    def build_heads(self) -> dict[str, nn.Module]:
        """Builds the modules behind the encoder without storage."""
        return {
            key: build_module(node, f"heads.{key}")
            for key, node in self.heads.items()
        }


@dataclass(frozen=True)
class RecognizerSource:
    """What a folder needs beside the weights.

    ``encoder`` has the encoder's key and the settings of its wrapper; ``heads``
    are the YAML of the modules behind it, by key, in the order of their use.
    """

    encoder: dict
    config: str = field(repr=False)
    heads: dict[str, str]
    tokenizer_class: str
    tokenizer_file: str
    tokenizer: bytes = field(repr=False)
    blank_index: int
    sample_rate: int

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the modules, the encoder first."""
        return (self.encoder["key"], *self.heads)

    @property
    def files(self) -> dict[str, str | bytes]:
        """Content of files by name."""
        return {CONFIG_FILE: self.config, self.tokenizer_file: self.tokenizer}

    def hyperparams(self, checksum: str, backend: str) -> str:
        """Returns the text of ``hyperparams.yaml``."""
        heads = [
            f"\n        {line}"
            for text in self.heads.values()
            for line in text.strip("\n").splitlines()
        ]
        head = HEAD.format(interface="EncoderASR", backend=backend)
        return head + _HYPERPARAMS.format(
            sample_rate=self.sample_rate,
            blank_index=self.blank_index,
            checksum=json.dumps(checksum),
            encoder=json.dumps(self.encoder),
            heads="".join(heads) or " {}",
            tokenizer_class=self.tokenizer_class,
            tokenizer_file=json.dumps(self.tokenizer_file),
        )


def read_spec(folder: Path) -> tuple[RecognizerSpec, str]:
    """Reads a folder's description and returns it with the name of its file."""
    readers = {RECOGNIZER_FILE: _spec_of_json, HYPERPARAMS_FILE: spec_of_yaml}
    for name, read in readers.items():
        path = folder / name
        if path.exists():
            wrong = "describes no recognizer that is made from data alone"
            with reading(path, wrong, "copy or make the folder again"):
                return read(read_file(path).decode("utf-8")), name
    why = (
        "the report of the run that wrote it says why"
        if (folder / PLAN_FILE).exists()
        else "give the folder `quantized` of a run, or its `model`"
    )
    raise CheckpointError(f"{folder}: holds no quantized recognizer; {why}")


def _spec_of_json(text: str) -> RecognizerSpec:
    raw = typed(parse_json(text), dict, "recognizer")
    if raw.pop("format", None) != SPEC_FORMAT:
        raise ValueError(f"its format is not {SPEC_FORMAT}")
    heads: dict[str, Node] = {}
    for i, row in enumerate(typed(raw.pop("heads", None), list, "heads")):
        rows = typed(row, dict, f"heads[{i}]")
        key = _check_key(rows.pop("key", None), heads)
        heads[key] = node_of_json(rows, f"heads.{key}")
    return _checked({**raw, "checksum": None}, heads)


def interface_of(keys: Set[str], parts: Set[str]) -> str | None:
    """SpeechBrain's class for a YAML with these keys and modules, if any."""
    for name, (needed, options) in INTERFACES.items():
        if needed <= parts and options <= keys:
            return name
    return None


def interface_of_folder(folder: Path) -> str | None:
    """SpeechBrain's class for a folder of a recognizer that is more than a
    described encoder with CTC; None for others."""
    path = folder / HYPERPARAMS_FILE
    if (folder / RECOGNIZER_FILE).exists() or not path.exists():
        return None
    with reading(path, "cannot be read", "copy or make the folder again"):
        tree = parse_yaml(read_file(path).decode("utf-8"))
        if not isinstance(tree, Mapping):
            return None
        if getattr(tree.get("pretrainer"), "tag", None) != _MODULES_LOADER:
            return None
        modules = typed(tree.get("modules"), dict, "modules")
        found = interface_of(set(tree), set(modules))
        if found is None:
            raise ValueError("it is of none of SpeechBrain's classes")
    return found


def spec_of_yaml(text: str) -> RecognizerSpec:
    """Reads our own ``hyperparams.yaml`` and refuses everything else."""
    raw = typed(parse_yaml(text), dict, "it")
    if "speechbrain_stablequant." not in text:
        raise ValueError(
            "it is of a float model, which `stablequant quantize` takes"
        )
    encoder = _tagged(raw, "encoder", _RECOGNIZER)
    loader = _tagged(raw, "pretrainer", _LOADER)
    for key, tag, name, target in (
        ("decoding_function", _DECODER, "blank_id", "blank_index"),
        ("audio_normalizer", _NORMALIZER, "sample_rate", "sample_rate"),
    ):
        settings = _tagged(raw, key, tag)
        known = ({name: Tagged("ref", f"<{target}>")}, {name: raw.get(target)})
        if settings not in known:
            raise ValueError(
                f"{name}: must be !ref <{target}>, not {short(settings)}"
            )
    heads: dict[str, Node] = {}
    for name, value in typed(encoder.get("heads"), dict, "heads").items():
        key = _check_key(name, heads)
        heads[key] = node_of_yaml(value, f"heads.{key}")
    tokenizer = raw.get("tokenizer")
    tag = getattr(tokenizer, "tag", None)
    if tag not in _TOKENIZERS:
        raise ValueError(f"tokenizer: cannot be {short(tokenizer)}")
    rows = {
        key: raw[key]
        for key in ("blank_index", "sample_rate", "backend", "backend_options")
        if key in raw
    }
    rows |= {
        "encoder": encoder.get("encoder"),
        "tokenizer": _TOKENIZERS[tag],
        "tokenizer_file": loader.get("tokenizer_file"),
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


def _checked(
    raw: Mapping[str, Any], heads: Mapping[str, Node]
) -> RecognizerSpec:
    """Returns a description after checking its values."""
    spec = typed({**raw, "heads": {}}, RecognizerSpec, "the recognizer")
    plain_name(spec.tokenizer_file)
    _check_key(spec.encoder.key, heads)
    return replace(spec, heads=heads)
