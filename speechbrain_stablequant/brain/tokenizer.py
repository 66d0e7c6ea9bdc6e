"""The tokenizer of a recipe, as an inference folder stores it."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import speechbrain as sb
from speechbrain.dataio.encoder import CTCTextEncoder

from .errors import NoFolderError
from .metrics import Row

Tokenizer = CTCTextEncoder | sentencepiece.SentencePieceProcessor
#: What SpeechBrain's ErrorRateStats reads as a space between words.
SPACE = "_"


def find_tokenizer(brain: sb.Brain) -> Tokenizer | None:
    """Find the tokenizer among the attributes of a Brain and its hparams."""
    places = {**vars(brain.hparams), **vars(brain)}
    names = [n for n in ("tokenizer", "label_encoder") if n in places]
    for name in [*names, *places]:
        value = places[name]
        # SpeechBrain's SentencePiece holds the processor.
        value = getattr(value, "sp", value)
        if isinstance(value, Tokenizer):
            return value
    return None


def describe_tokenizer(tokenizer: Tokenizer) -> tuple[str, str, bytes]:
    """Class name, file name and file content of a tokenizer."""
    if isinstance(tokenizer, CTCTextEncoder):
        return (
            "speechbrain.dataio.encoder.CTCTextEncoder",
            "label_encoder.txt",
            _label_encoder_text(tokenizer),
        )
    return (
        "sentencepiece.SentencePieceProcessor",
        "tokenizer.model",
        tokenizer.serialized_model_proto(),
    )


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer's class, and its file."""

    kind: str
    file: str
    content: bytes


def markers_of(brain: sb.Brain) -> list[str]:
    """What a recipe with a tokenizer of HuggingFace takes out of its texts."""
    tokenizer = getattr(brain, "tokenizer", None)
    names = ("cls_token", "sep_token", "pad_token")
    found = [getattr(tokenizer, name, None) for name in names]
    return [x for x in found if isinstance(x, str)]


def folder_tokenizer(
    brain: sb.Brain,
    rows: Sequence[Row],
    decodes: bool,
    labels: Sequence[str] = (),
) -> TokenizerFile:
    """The tokenizer of a folder, which writes a space where the recipe that
    recognized ``rows`` does; of one that ``decodes`` ids itself. ``labels``
    are used where the recipe has no tokenizer of a kind that folders hold."""
    tokenizer = find_tokenizer(brain)
    if tokenizer is None and labels and len(set(labels)) == len(labels):
        tokenizer = CTCTextEncoder()
        for label in labels:
            tokenizer.add_label(label)
    if tokenizer is None:
        raise NoFolderError(
            "neither the Brain nor its hparams hold a CTCTextEncoder or a "
            "SentencePiece tokenizer; set brain.tokenizer"
        )
    if writes_underscores(tokenizer, rows):
        tokenizer = with_spaces(tokenizer)
    found = TokenizerFile(*describe_tokenizer(tokenizer))
    if decodes and isinstance(tokenizer, CTCTextEncoder):
        kind = "speechbrain_stablequant.inference.LabelTokenizer"
        return replace(found, kind=kind)
    return found


def _label_encoder_text(encoder: CTCTextEncoder) -> bytes:
    # SpeechBrain's encoder can only write to a file.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "label_encoder.txt"
        encoder.save(str(path))
        return path.read_bytes()


def with_spaces(encoder: CTCTextEncoder) -> CTCTextEncoder:
    """Copy a label encoder, replacing its label ``_`` by a space."""
    other = copy.deepcopy(encoder)
    index = other.lab2ind.pop(SPACE)
    other.lab2ind[" "] = index
    other.ind2lab[index] = " "
    return other


def writes_underscores(tokenizer: Tokenizer, rows: Sequence[Row]) -> bool:
    """Whether a recipe uses the label ``_`` as the space between words.

    True if there is no label for a space and no word of the recipe holds ``_``:
    it stands alone, as in SpeechBrain's metric, or is gone after splitting.
    """
    if not isinstance(tokenizer, CTCTextEncoder):
        return False
    labels = tokenizer.lab2ind
    tokens = {t for row in rows for t in (*row.reference, *row.hypothesis)}
    return (
        SPACE in labels
        and " " not in labels
        and not any(SPACE in token and token != SPACE for token in tokens)
        # Utterances of one token say nothing about spaces.
        and (SPACE in tokens or any(len(row.reference) > 1 for row in rows))
    )
