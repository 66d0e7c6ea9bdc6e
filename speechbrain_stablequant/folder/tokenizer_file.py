"""Reads and checks a folder's tokenizer: both libraries trust their files."""

from pathlib import Path

import sentencepiece
from speechbrain.dataio.encoder import CTCTextEncoder

from ..utils.files import read_file
from ..utils.typed import short, typed
from .errors import reading

Tokenizer = CTCTextEncoder | sentencepiece.SentencePieceProcessor

# Limits; SpeechBrain parses labels as Python literals, line by line.
_MAX_BYTES = 1 << 26
_MAX_TEXT = 1 << 24
_MAX_LINE = 2000
_MAX_LABELS = 1 << 20


def read_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Fills a tokenizer from its file, replacing what it held."""
    if isinstance(tokenizer, CTCTextEncoder):
        read, what = _read_labels, "labels"
    else:
        read, what = _read_pieces, "SentencePiece model"
    with reading(path, f"holds no {what}"):
        read(tokenizer, path)


def _read_labels(encoder: CTCTextEncoder, path: Path) -> None:
    data = read_file(path)
    lines = data.decode("utf-8").splitlines()
    if len(data) > _MAX_TEXT or any(len(line) > _MAX_LINE for line in lines):
        raise ValueError("it is too large, or a line of it is too long")
    read = CTCTextEncoder()
    try:
        read.load(str(path))
    except Exception as error:
        # SpeechBrain evaluates literals, which may raise anything.
        raise ValueError(f"{type(error).__name__}: {error}") from error
    labels, indices = read.lab2ind, read.ind2lab
    if not labels or len(labels) != len(indices):
        raise ValueError("it has no labels, or two of one index")
    for label, index in labels.items():
        text = typed(label, str, f"label {short(index)}")
        # Raises for lone surrogates, which cannot be printed.
        text.encode()
        if not 0 <= index < _MAX_LABELS:
            raise ValueError(f"label {short(label)} has index {short(index)}")
    for key in ("blank_label", "unk_label"):
        special = getattr(read, key, None)
        if special is not None and special not in list(labels):
            raise ValueError(f"{key} {short(special)} is none of its labels")
    typed(read.starting_index, int, "starting_index")
    encoder.load(str(path))
    encoder.expect_len(len(encoder))


def _read_pieces(
    processor: sentencepiece.SentencePieceProcessor, path: Path
) -> None:
    data = read_file(path)
    if not 0 < len(data) < _MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes")
    try:
        processor.LoadFromSerializedProto(data)
        count = processor.get_piece_size()
    except Exception as error:
        # A third-party library on an untrusted file may raise anything.
        raise ValueError(error) from error
    if not 0 < count < _MAX_LABELS:
        raise ValueError(f"it has {count} pieces")


def labels_of(tokenizer: Tokenizer) -> list[str | None]:
    """Returns the label or piece of each index; None where there is none."""
    if isinstance(tokenizer, CTCTextEncoder):
        known = tokenizer.ind2lab
        return [known.get(i) for i in range(max(known) + 1)]
    return [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
