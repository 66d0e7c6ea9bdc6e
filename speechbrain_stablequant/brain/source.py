"""A pretrained recognizer in the layout of SpeechBrain's Hub folders.

HyperPyYAML constructs whatever a YAML names, so a source is read as data first:
tags may only name what SpeechBrain and torch offer for models, and checkpoints
may only hold tensors.
"""

import io
import pickle
import pydoc
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import speechbrain.inference.ASR
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from hyperpyyaml import resolve_references
from speechbrain.inference.interfaces import Pretrained

from ..folder.recognizer_spec import (
    HYPERPARAMS_FILE,
    INTERFACES,
    interface_of,
)
from ..utils.patching import shadowed
from ..utils.typed import one_line, short
from ..utils.yaml_tree import Tagged, parse_yaml
from .preflight import checkpoints

# Where tags may point, and where what they name must have been written. Not
# speechbrain.augment, whose files may be pickles, nor speechbrain.tokenizers,
# which trains and writes.
_TRUSTED = (
    *("speechbrain.dataio.encoder", "speechbrain.dataio.preprocess"),
    *("speechbrain.decoders", "speechbrain.integrations.huggingface"),
    *("speechbrain.lm", "speechbrain.lobes", "speechbrain.nnet"),
    *("speechbrain.processing", "speechbrain.utils.dynamic_chunk_training"),
    *("speechbrain.utils.metric_stats", "speechbrain.utils.parameter_transfer"),
    *("torch.nn", "torch._C._nn"),
)
# These load pickles, or code of the Hub.
_UNTRUSTED = (
    "speechbrain.integrations.huggingface.mert",
    "speechbrain.lobes.models.MSTacotron2",
)
_EXACT = (
    "new:sentencepiece.SentencePieceProcessor",
    "name:sentencepiece.SentencePieceProcessor",
    *("apply:torch.manual_seed", "apply:speechbrain.utils.seed_everything"),
)
_HARMLESS = ("ref", "copy", "PLACEHOLDER")
# HyperPyYAML reads what stands in a tuple with a loader that runs its tags.
_PLAIN_TUPLE = re.compile(r"\([\w\s.,+-]*\)")
_SOURCES = (
    "give a folder in the layout of SpeechBrain's pretrained models, or the "
    "id of one on the Hub, such as speechbrain/asr-wav2vec2-librispeech"
)
_HINT = "if you trust its authors, pass trust_source=True"


class SourceError(ValueError):
    """A source that cannot be quantized, and why, in one line."""


def source_folder(source: str | Path) -> Path:
    """The folder of a source; one of the Hub is downloaded first."""
    folder = Path(source)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise SourceError(f"source: {source} is a file; give its folder")
    wrong = f"source: {source}: there is no such folder"
    try:
        validate_repo_id(str(source))
        return Path(snapshot_download(str(source)))
    except HFValidationError as error:
        raise SourceError(f"{wrong}; {_SOURCES}") from error
    except Exception as error:
        why = _not_on_hub(error) or (
            f"it cannot be downloaded from {constants.ENDPOINT} "
            f"({type(error).__name__}: {one_line(error)}); correct that"
        )
        raise SourceError(f"{wrong}, and {why}, or {_SOURCES}") from error


def _not_on_hub(error: BaseException | None) -> str | None:
    """Why the Hub has no model for us, and what to do; None for an error that
    is of something else. Libraries raise their own from the Hub's."""
    while error is not None:
        # Of gated models, too.
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"{constants.ENDPOINT} shows you no such model; correct the "
                "name, log in (`hf auth login`) if it is private or gated"
            )
        if isinstance(error, LocalEntryNotFoundError):
            place = f"the cache {constants.HF_HUB_CACHE} has no whole copy"
            if constants.HF_HUB_OFFLINE:
                return f"{place}; unset HF_HUB_OFFLINE to download it"
            answer = getattr(error.__cause__, "response", None)
            state = "cannot be reached"
            if answer is not None:
                state = f"answers with status {answer.status_code}"
            return (
                f"{place}, and {constants.ENDPOINT} {state}; check the network "
                "or try again later"
            )
        error = error.__cause__ or error.__context__
    return None


def check_source(folder: Path, trust: bool) -> str:
    """Name of the class for a source, after its YAML was checked as data."""
    path = folder / HYPERPARAMS_FILE
    try:
        text = path.read_text(encoding="utf-8")
        tree = parse_yaml(text)
        kind = _class_of(tree, path)
        if not trust:
            _check_tags(tree, path)
            # Quotes are lost, and strings put together, when it is loaded.
            _check_tags(parse_yaml(resolved(path).getvalue()), path)
    except SourceError:
        raise
    except FileNotFoundError as error:
        message = (
            f"source: {folder} has no {path.name}: give a folder in the "
            "layout of SpeechBrain's pretrained models"
        )
        if (folder / "config.json").exists():
            message = (
                f"source: {folder} is a HuggingFace checkpoint: of a wav2vec "
                "2.0 or HuBERT with CTC, `make_hub_folder.py OUT --checkpoint "
                f"{folder}` of the LibriSpeech CTC recipe makes a source, and "
                f"that recipe quantizes it with `--wav2vec2_hub {folder}`"
            )
        raise SourceError(message) from error
    except (OSError, ValueError) as error:
        message = f"source: {path} cannot be read ({one_line(error)})"
        raise SourceError(message) from error
    if not trust and (folder / "custom.py").exists():
        raise SourceError(
            f"source: {folder / 'custom.py'} is code of its own; {_HINT}"
        )
    return kind


def resolved(path: Path) -> io.StringIO:
    """The text of a YAML with its references resolved."""
    with open(path, encoding="utf-8") as file:
        return resolve_references(file)


def _class_of(tree: Any, path: Path) -> str:
    keys = set(tree) if isinstance(tree, Mapping) else set()
    modules = tree.get("modules") if isinstance(tree, Mapping) else None
    parts = set(modules) if isinstance(modules, Mapping) else set()
    if "make_decoder_streaming_context" in keys:
        raise SourceError(
            f"source: {path} is of a StreamingASR, which cannot be quantized "
            "yet"
        )
    if any("speechbrain_stablequant" in tag for tag, _ in _tags(tree)):
        raise SourceError(f"source: {path.parent} is quantized already")
    name = interface_of(keys, parts)
    if name is not None:
        return name
    raise SourceError(
        f"source: {path} is of none of {', '.join(INTERFACES)}: its modules "
        f"are {', '.join(sorted(parts)) or 'missing'}; SpeechBrain's classes "
        "need encoder with the keys tokenizer and decoding_function, encoder "
        "and decoder with tokenizer, or whisper and decoder with language and "
        "sample_rate"
    )


def _tags(tree: Any) -> Iterator[tuple[str, Any]]:
    """Tags and values of all nodes, the tag of plain ones empty."""
    tag, value = "", tree
    if isinstance(tree, Tagged):
        tag, value = tree.tag, tree.value
    yield tag, value
    parts = value if isinstance(value, list) else ()
    if isinstance(value, Mapping):
        parts = (*value, *value.values())
    for part in parts:
        yield from _tags(part)


def _check_tags(tree: Any, path: Path) -> None:
    for tag, value in _tags(tree):
        if not _is_trusted(tag, value):
            what = f"tag !{tag}" if tag else f"value {short(value)}"
            raise SourceError(
                f"source: the {what} in {path} is neither a part of a model "
                f"of SpeechBrain nor of torch; {_HINT}"
            )


def _is_trusted(tag: str, value: Any) -> bool:
    if isinstance(value, str):
        # `(...)` is read as a tuple, too.
        if value.lstrip().startswith("(") and "!" in value:
            return False
        if tag == "tuple":
            return _PLAIN_TUPLE.fullmatch(value) is not None
        # `<key._attribute>` is a way to all of Python.
        if tag in ("ref", "copy") and "._" in value:
            return False
    # Also as a value, of what becomes a mapping.
    if isinstance(value, Mapping) and "trust_remote_code" in value:
        return False
    if value == "trust_remote_code":
        return False
    kind, _, name = tag.partition(":")
    if tag == "apply:getattr":  # A resolved `<key.attribute>`.
        name = value[1] if isinstance(value, list) and len(value) == 2 else "_"
        return isinstance(name, str) and not name.startswith("_")
    if not tag or tag in _HARMLESS or tag in _EXACT:
        return True
    return kind in ("new", "name") and _is_model_part(name)


def _is_model_part(name: str) -> bool:
    """Whether a name is of a class or function for models, wherever it was
    imported: ``torch.nn.os.system`` is not."""
    if not _is_inside(name, _TRUSTED) or "._" in name:
        return False
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        raise SourceError(
            f"source: {name} cannot be imported ({one_line(error)})"
        ) from error
    home = getattr(found, "__module__", None) or ""
    trusted = _is_inside(home, _TRUSTED) and not _is_inside(home, _UNTRUSTED)
    # No methods: some write files.
    whole = "." not in getattr(found, "__qualname__", ".")
    return callable(found) and trusted and whole


def _is_inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in packages)


def load_source(
    folder: Path, kind: str, run_opts: Mapping[str, Any]
) -> Pretrained:
    """Load a checked source in SpeechBrain's class of that name."""
    interface = getattr(speechbrain.inference.ASR, kind)
    try:
        # No `savedir`: files are read where they are.
        return interface.from_hparams(
            source=str(folder), run_opts=dict(run_opts)
        )
    except Exception as error:
        why = _not_on_hub(error)
        if why is None:
            raise
        names = " or ".join(_elsewhere(folder)) or "a model"
        raise SourceError(
            f"source: {folder / HYPERPARAMS_FILE} names {names}, which is no "
            f"folder or file here, and {why}, or write a path"
        ) from error


def _elsewhere(folder: Path) -> list[str]:
    """Checkpoints and files that a source names and that are not here."""
    tree = parse_yaml(resolved(folder / HYPERPARAMS_FILE).getvalue())
    found = [value for _, value in checkpoints(tree)]
    pretrainer = getattr(tree.get("pretrainer"), "value", None) or {}
    found += (pretrainer.get("paths") or {}).values()
    return [
        name
        for name in dict.fromkeys(x for x in found if isinstance(x, str))
        if not any(path.exists() for path in (folder / name, Path(name)))
    ]


@contextmanager
def allowed(folder: Path, trust: bool) -> Iterator[None]:
    """Let a trusted source import modules of its folder; of others, refuse
    checkpoints that hold more than tensors, whoever loads them."""
    if trust:
        sys.path.append(str(folder))
        try:
            yield
        finally:
            sys.path.remove(str(folder))
        return
    load = torch.load

    def load_tensors(file: Any, *args: Any, **options: Any) -> Any:
        try:
            return load(file, *args, **{**options, "weights_only": True})
        except pickle.UnpicklingError as error:
            raise SourceError(
                f"source: {file} holds more than tensors, or is damaged; "
                f"{_HINT} ({one_line(error, 200)})"
            ) from error

    with shadowed(torch, "load", load_tensors):
        yield
