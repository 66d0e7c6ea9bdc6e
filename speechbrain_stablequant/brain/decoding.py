"""Tokenizers and transcripts of a recipe, and of its inference folder.

A recipe may use beam search, write ``_`` for spaces, or change case. Its
folder decodes greedily and joins labels, as ``EncoderASR`` does. Both are
compared on the same outputs.
"""

import copy
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import speechbrain as sb
import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.decoders import ctc_greedy_decode
from torch import nn

from ..folder.errors import NoFolderError
from ..utils.patching import shadowed
from ..utils.typed import short
from .data import audio_of
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


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer's class, and its file."""

    kind: str
    file: str
    content: bytes


def describe_tokenizer(tokenizer: Tokenizer) -> TokenizerFile:
    """What stores and loads a tokenizer."""
    if not isinstance(tokenizer, CTCTextEncoder):
        content = tokenizer.serialized_model_proto()
        kind = "sentencepiece.SentencePieceProcessor"
        return TokenizerFile(kind, "tokenizer.model", content)
    # SpeechBrain's encoder can only write to a file.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "label_encoder.txt"
        tokenizer.save(str(path))
        kind = "speechbrain.dataio.encoder.CTCTextEncoder"
        return TokenizerFile(kind, path.name, path.read_bytes())


def required_tokenizer(brain: sb.Brain) -> Tokenizer:
    """The tokenizer of a Brain; NoFolderError if there is none."""
    tokenizer = find_tokenizer(brain)
    if tokenizer is None:
        raise NoFolderError(
            "neither the Brain nor its hparams hold a CTCTextEncoder or a "
            "SentencePiece tokenizer; set brain.tokenizer"
        )
    return tokenizer


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
    distinct = labels and len(set(labels)) == len(labels)
    if distinct and find_tokenizer(brain) is None:
        tokenizer = CTCTextEncoder()
        for label in labels:
            tokenizer.add_label(label)
    else:
        tokenizer = required_tokenizer(brain)
    if writes_underscores(tokenizer, rows):
        tokenizer = with_spaces(tokenizer)
    found = describe_tokenizer(tokenizer)
    if decodes and isinstance(tokenizer, CTCTextEncoder):
        kind = "speechbrain_stablequant.inference.LabelTokenizer"
        return replace(found, kind=kind)
    return found


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


@dataclass(eq=False)
class FolderDecoder:
    """Transcribes the recognizer's outputs as its folder would.

    ``last`` is the last module: its output is [batch, frames, labels].
    """

    last: nn.Module
    tokenizer: Tokenizer
    blank_index: int
    signal: str
    _spaces: bool = False

    def texts(
        self, outputs: torch.Tensor, lengths: torch.Tensor
    ) -> list[tuple[str, ...]]:
        """Labels of each utterance, from [batch, frames, labels] and relative
        lengths [batch]; joined, they are its transcript."""
        found = ctc_greedy_decode(
            outputs.float(), lengths.to(outputs.device), self.blank_index
        )
        if isinstance(self.tokenizer, CTCTextEncoder):
            labels = self.tokenizer.ind2lab
            return [tuple(labels.get(i, "") for i in ids) for ids in found]
        return [(self.tokenizer.decode_ids(ids),) for ids in found]

    def respelled(
        self, rows: Sequence[Row], texts: Sequence[tuple[str, ...]]
    ) -> list[tuple[str, ...]]:
        """Replace ``_`` by spaces, from the first rows on that need it."""
        if writes_underscores(self.tokenizer, rows):
            self.tokenizer = with_spaces(self.tokenizer)
            self._spaces = True
        if not self._spaces:
            return list(texts)
        return [
            tuple(" " if label == SPACE else label for label in text)
            for text in texts
        ]

    @contextmanager
    def listening(self, brain: sb.Brain) -> Iterator[list[tuple[str, ...]]]:
        """Transcribe each batch that a Brain recognizes into a list.

        Skips batches for which the last module is not called exactly once.
        """
        texts: list[tuple[str, ...]] = []
        outputs: list[torch.Tensor] = []
        compute = brain.compute_forward

        def compute_forward(batch: Any, *args: Any, **kwargs: Any) -> Any:
            outputs.clear()
            result = compute(batch, *args, **kwargs)
            if len(outputs) == 1:
                _, lengths = audio_of(batch, self.signal)
                texts.extend(self.texts(outputs[0], lengths))
            outputs.clear()
            return result

        listener = self.last.register_forward_hook(
            lambda _module, _args, output: outputs.append(output)
        )
        with listener, shadowed(brain, "compute_forward", compute_forward):
            yield texts


def same_text(rows: Sequence[Row], texts: Sequence[tuple[str, ...]]) -> bool:
    """Whether the transcripts of recipe and folder are the same text."""
    return len(rows) == len(texts) and any(
        all(
            _spaced(read(row.hypothesis)) == _spaced("".join(text))
            for row, text in zip(rows, texts, strict=True)
        )
        for read in _READINGS
    )


class Finding(NamedTuple):
    """A warning: for reports, which are published, and for the log alone."""

    text: str
    example: str  #: names an utterance


def difference(
    rows: Sequence[Row], texts: Sequence[tuple[str, ...]]
) -> Finding | None:
    """A warning that recipe and folder decode differently, with the first
    differing utterance, or None."""
    if same_text(rows, texts):
        return None
    for row, text in zip(rows, as_scored(rows, texts), strict=True):
        heard = _spaced(" ".join(row.hypothesis))
        if heard != text:
            return Finding(
                "The recipe decodes differently from its inference folder, "
                "which decodes greedily. The folder's own WER is in the "
                "report.",
                f"utterance {row.id} is {short(heard)} in the recipe and "
                f"{short(text)} in the folder",
            )
    return None


def _spaced(text: str) -> str:
    return " ".join(text.split())


# A recipe's tokens may be words, labels, or labels with ``_`` for spaces.
_READINGS = (
    " ".join,
    "".join,
    lambda tokens: "".join(" " if t == SPACE else t for t in tokens),
)


def as_scored(
    rows: Sequence[Row], texts: Iterable[tuple[str, ...]]
) -> list[str]:
    """The folder's transcripts in the recipe's tokens: words or characters."""
    plain = [_spaced("".join(text)) for text in texts]
    tokens = {t for row in rows for t in (*row.reference, *row.hypothesis)}
    if any(len(token) > 1 for token in tokens):
        return plain
    if SPACE in tokens:
        plain = [text.replace(" ", SPACE) for text in plain]
    return [" ".join(text) for text in plain]
