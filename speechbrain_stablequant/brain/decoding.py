"""Compares a recipe's decoding with that of its inference folder.

A recipe may use beam search, write ``_`` for spaces, or change case. Its
folder decodes greedily and joins labels, as ``EncoderASR`` does. Both are
compared on the same outputs.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import speechbrain as sb
import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.decoders import ctc_greedy_decode
from torch import nn

from ..utils.patching import shadowed
from ..utils.typed import short
from .data import audio_of
from .metrics import Row
from .tokenizer import SPACE, Tokenizer, with_spaces, writes_underscores


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


def difference(
    rows: Sequence[Row], texts: Sequence[tuple[str, ...]]
) -> str | None:
    """A warning that names the first differing utterance, or None."""
    if same_text(rows, texts):
        return None
    for row, text in zip(rows, as_scored(rows, texts), strict=True):
        heard = _spaced(" ".join(row.hypothesis))
        if heard != text:
            return (
                "The recipe decodes differently from its inference folder, "
                f"which decodes greedily: utterance {row.id} is "
                f"{short(heard)} in the recipe and {short(text)} in the "
                "folder. The folder's own WER is in the report."
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
