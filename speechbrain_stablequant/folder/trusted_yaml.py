"""What a YAML in SpeechBrain's layout may name without being trusted.

HyperPyYAML constructs whatever a YAML names, so it is read as data first: tags
may only name what SpeechBrain and torch offer for models.
"""

import io
import pydoc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperpyyaml import resolve_references

from ..utils.typed import one_line, short
from ..utils.yaml_tree import Tagged, parse_yaml

# Where tags may point, and where what they name must have been written. A
# quantized folder needs less: nothing of it may name other files.
_FOLDER = (
    *("speechbrain.dataio.encoder", "speechbrain.dataio.preprocess"),
    *("speechbrain.decoders", "speechbrain.lobes", "speechbrain.nnet"),
    *("speechbrain.processing", "torch.nn", "torch._C._nn"),
)
_SOURCE = (
    *_FOLDER,
    *("speechbrain.augment", "speechbrain.integrations.huggingface"),
    *("speechbrain.lm", "speechbrain.tokenizers"),
    "speechbrain.utils.dynamic_chunk_training",
    *("speechbrain.utils.metric_stats", "speechbrain.utils.parameter_transfer"),
)
# What our own folders name beside them.
_INFERENCE = "speechbrain_stablequant.inference."
_LATE = f"new:{_INFERENCE}LateModule"
_CHAIN = f"new:{_INFERENCE}EncoderChain"
_OURS = (
    *(_LATE, _CHAIN, f"new:{_INFERENCE}ModulesLoader"),
    *(
        f"new:{_INFERENCE}LabelTokenizer",
        f"name:{_INFERENCE}MarkedBeamSearcher",
    ),
)
# These load pickles, or code of the Hub.
_UNTRUSTED = (
    "speechbrain.integrations.huggingface.mert",
    "speechbrain.lobes.models.MSTacotron2",
)
_EXACT = (
    *("sentencepiece.SentencePieceProcessor", "torch.manual_seed"),
    "speechbrain.utils.seed_everything",
)
_HARMLESS = ("ref", "copy", "tuple", "PLACEHOLDER")

#: Keys of `modules`, and of the YAML, that tell SpeechBrain's classes apart.
INTERFACES = {
    "WhisperASR": ({"whisper", "decoder"}, {"language", "sample_rate"}),
    "EncoderDecoderASR": ({"encoder", "decoder"}, {"tokenizer"}),
    "EncoderASR": ({"encoder"}, {"tokenizer", "decoding_function"}),
}


def interface_of(tree: Any) -> str | None:
    """SpeechBrain's class for a YAML that was read as data, if any."""
    keys = set(tree) if isinstance(tree, Mapping) else set()
    modules = tree.get("modules") if isinstance(tree, Mapping) else None
    parts = set(modules) if isinstance(modules, Mapping) else set()
    for name, (needed, options) in INTERFACES.items():
        if needed <= parts and options <= keys:
            return name
    return None


def untrusted(path: Path, ours: bool = False) -> str | None:
    """What a YAML names that is no part of a model, if anything; ``ours``: of
    a quantized folder."""
    found = _untrusted(path.read_text(encoding="utf-8"), ours)
    # Quotes are lost, and strings put together, when it is loaded.
    found = found or _untrusted(resolved(path).getvalue(), ours)
    if found is None:
        return None
    return (
        f"the {found} in {path} is neither a part of a model of SpeechBrain "
        "nor of torch"
    )


def _untrusted(text: str, ours: bool) -> str | None:
    for tag, value in tags_of(parse_yaml(text)):
        trusted = _is_harmless(tag, value) and (
            _is_ours(tag, value)
            if ours and tag in _OURS
            else _is_trusted(tag, value, _FOLDER if ours else _SOURCE)
        )
        if not trusted:
            return f"tag !{tag}" if tag else f"value {short(value)}"
    return None


def resolved(path: Path) -> io.StringIO:
    """The text of a YAML with its references resolved."""
    with open(path, encoding="utf-8") as file:
        return resolve_references(file)


def tags_of(tree: Any) -> Iterator[tuple[str, Any]]:
    """Tags and values of all nodes, the tag of plain ones empty."""
    tag, value = "", tree
    if isinstance(tree, Tagged):
        tag, value = tree.tag, tree.value
    yield tag, value
    parts = value if isinstance(value, list) else ()
    if isinstance(value, Mapping):
        parts = (*value, *value.values())
    for part in parts:
        yield from tags_of(part)


def _is_harmless(tag: str, value: Any) -> bool:
    if isinstance(value, str):
        # HyperPyYAML reads `(...)` as a tuple, and runs the tags in it.
        if value.lstrip().startswith("(") and "!" in value:
            return False
        # `<key._attribute>` is a way to all of Python.
        if tag in ("ref", "copy") and "._" in value:
            return False
    return not (isinstance(value, Mapping) and "trust_remote_code" in value)


def _is_ours(tag: str, value: Any) -> bool:
    """Whether a tag of ours names in its arguments only what tags may."""
    value = value if isinstance(value, Mapping) else {}
    if tag == _LATE:
        # A wrapper gets this folder for its files.
        kind = value.get("kind")
        return isinstance(kind, str) and _is_model_part(kind, _SOURCE)
    calls = value.get("calls", []) if tag == _CHAIN else []
    return isinstance(calls, list) and not any(
        str(call.get("method", "")).startswith("_")
        for call in calls
        if isinstance(call, Mapping)
    )


def _is_trusted(tag: str, value: Any, packages: Sequence[str]) -> bool:
    kind, _, name = tag.partition(":")
    if tag == "apply:getattr":  # A resolved `<key.attribute>`.
        name = value[1] if isinstance(value, list) and len(value) == 2 else "_"
        return isinstance(name, str) and not name.startswith("_")
    if not tag or tag in _HARMLESS or name in _EXACT:
        return True
    return kind in ("new", "name") and _is_model_part(name, packages)


def _is_model_part(name: str, packages: Sequence[str]) -> bool:
    """Whether a name is of a class or function for models, wherever it was
    imported: ``torch.nn.os.system`` is not."""
    if not _is_inside(name, packages) or "._" in name:
        return False
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        raise ValueError(
            f"{name} cannot be imported ({one_line(error)})"
        ) from error
    home = getattr(found, "__module__", None) or ""
    trusted = _is_inside(home, packages) and not _is_inside(home, _UNTRUSTED)
    return callable(found) and trusted


def _is_inside(name: str, packages: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in packages)
