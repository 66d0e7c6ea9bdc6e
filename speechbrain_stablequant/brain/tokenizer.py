"""The tokenizer of a recipe, as an inference folder stores it."""

import copy
import tempfile
from pathlib import Path

import sentencepiece
import speechbrain as sb
from speechbrain.dataio.encoder import CTCTextEncoder

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
