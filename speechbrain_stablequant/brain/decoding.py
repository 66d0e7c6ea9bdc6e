"""What an inference folder would transcribe, beside what the recipe does.

A recipe may decode by beams, write ``_`` for spaces, or change the case of
what it has recognized. Its folder decodes greedily and joins the labels, as
``EncoderASR`` does. So both are compared on the same outputs.
"""

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import speechbrain as sb
import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.decoders import ctc_greedy_decode
from torch import nn

from ..utils.patching import shadowed
from ..utils.typed import short
from .data import audio_of

Tokenizer = CTCTextEncoder | sentencepiece.SentencePieceProcessor

#: What SpeechBrain's ErrorRateStats takes for a space between words.
SPACE = "_"


def find_tokenizer(brain: sb.Brain) -> Tokenizer | None:
    """The recipe's CTCTextEncoder or SentencePieceProcessor.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's.

    Returns
    -------
    CTCTextEncoder or SentencePieceProcessor or None
    """
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
    """Class, file name and content of the file that a tokenizer is made from.

    Arguments
    ---------
    tokenizer : CTCTextEncoder or SentencePieceProcessor
        The recipe's.

    Returns
    -------
    tuple of (str, str, bytes)
    """
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
    # SpeechBrain's encoder only writes to files.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "label_encoder.txt"
        encoder.save(str(path))
        return path.read_bytes()


def with_spaces(encoder: CTCTextEncoder) -> CTCTextEncoder:
    """A label encoder with a space in the place of ``_``.

    Arguments
    ---------
    encoder : CTCTextEncoder
        Has ``_`` and no space.

    Returns
    -------
    CTCTextEncoder
        Another one.

    Example
    -------
    >>> encoder = CTCTextEncoder()
    >>> encoder.update_from_iterable("A_", sequence_input=False)
    >>> with_spaces(encoder).decode_ndim([0, 1])
    ['A', ' ']
    """
    other = copy.deepcopy(encoder)
    index = other.lab2ind.pop(SPACE)
    other.lab2ind[" "] = index
    other.ind2lab[index] = " "
    return other


# -- what a metric has collected ---------------------------------------------


@dataclass(frozen=True)
class Row:
    """An utterance as the recipe's metric has scored it.

    Arguments
    ---------
    id : str
        The utterance.
    reference, hypothesis : tuple of str
        Tokens: words, or labels, as the recipe gives them.
    """

    id: str
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]


def rows_of(scores: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The utterances of a metric.

    Arguments
    ---------
    scores : iterable
        ``ErrorRateStats.scores``.

    Returns
    -------
    list of Row
    """
    return [
        Row(
            str(row["key"]),
            tuple(str(token) for token in row["ref_tokens"]),
            tuple(str(token) for token in row["hyp_tokens"] if token != ""),
        )
        for row in scores
    ]


def writes_underscores(tokenizer: Tokenizer, rows: Sequence[Row]) -> bool:
    """Whether a recipe's label ``_`` is the space between its words.

    Arguments
    ---------
    tokenizer : CTCTextEncoder or SentencePieceProcessor
        The recipe's.
    rows : sequence of Row
        What its metric has scored.

    Returns
    -------
    bool
        True where there is such a label, none for a space, and no word of
        the recipe holds the label: ``_`` stands alone, as SpeechBrain's
        metric has it, or is gone where words are split.

    Example
    -------
    >>> encoder = CTCTextEncoder()
    >>> encoder.update_from_iterable("AB_", sequence_input=False)
    >>> writes_underscores(encoder, [Row("u", ("AB", "A"), ("AB", "A"))])
    True
    >>> writes_underscores(encoder, [Row("u", ("AB_A",), ("AB_A",))])
    False
    """
    if not isinstance(tokenizer, CTCTextEncoder):
        return False
    labels = tokenizer.lab2ind
    tokens = {t for row in rows for t in (*row.reference, *row.hypothesis)}
    return (
        SPACE in labels
        and " " not in labels
        and not any(SPACE in token and token != SPACE for token in tokens)
        # One token for each utterance says nothing about spaces.
        and (SPACE in tokens or any(len(row.reference) > 1 for row in rows))
    )


# -- the folder's own transcripts ----------------------------------------------


class FolderDecoder:
    """Transcribes as the folder would, from what the modules compute.

    Arguments
    ---------
    last : torch.nn.Module
        The last module of the recognizer: gives [batch, frames, labels].
    tokenizer : CTCTextEncoder or SentencePieceProcessor
        Of the folder.
    blank_index : int
        Of the CTC blank.
    signal : str
        Attribute of a batch with the audio and its lengths.
    """

    def __init__(
        self,
        last: nn.Module,
        tokenizer: Tokenizer,
        blank_index: int,
        signal: str,
    ):
        self.last = last
        self.tokenizer = tokenizer
        self.blank_index = blank_index
        self.signal = signal
        self._spaces = False

    def texts(
        self, outputs: torch.Tensor, lengths: torch.Tensor
    ) -> list[tuple[str, ...]]:
        """The labels of each utterance; joined, they are its transcript.

        Arguments
        ---------
        outputs : torch.Tensor
            [batch, frames, labels].
        lengths : torch.Tensor
            [batch], relative.

        Returns
        -------
        list of tuple of str
        """
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
        """Transcripts with spaces, and all later ones as well, where the
        recipe's label for a space is ``_``.

        Arguments
        ---------
        rows : sequence of Row
            The recipe's.
        texts : sequence of tuple of str
            The folder's, of the same utterances.

        Returns
        -------
        list of tuple of str
        """
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
        """Context in which each batch that a Brain recognizes is transcribed
        as well.

        Arguments
        ---------
        brain : sb.Brain
            The recipe's.

        Yields
        ------
        list of tuple of str
            Grows by the utterances of each batch; empty at the end of one
            whose last module was not called exactly once.
        """
        texts: list[tuple[str, ...]] = []
        outputs: list[Any] = []
        compute = brain.compute_forward

        def compute_forward(batch: Any, *args: Any, **kwargs: Any) -> Any:
            outputs.clear()
            result = compute(batch, *args, **kwargs)
            if len(outputs) == 1:
                _, lengths = audio_of(batch, self.signal)
                texts.extend(self.texts(outputs[0], lengths))
            outputs.clear()
            return result

        handle = self.last.register_forward_hook(
            lambda _module, _args, output: outputs.append(output)
        )
        try:
            with shadowed(brain, "compute_forward", compute_forward):
                yield texts
        finally:
            handle.remove()


def same_text(rows: Sequence[Row], texts: Sequence[tuple[str, ...]]) -> bool:
    """Whether the recipe's transcripts are those of the folder.

    Arguments
    ---------
    rows : sequence of Row
        The recipe's.
    texts : sequence of tuple of str
        The folder's, of the same utterances.

    Returns
    -------
    bool

    Example
    -------
    >>> words = [Row("u", ("A B",), ("AB", "A"))]
    >>> same_text(words, [("A", "B", " ", "A")])
    True
    >>> same_text([Row("u", ("a",), ("ab",))], [("A", "B")])
    False
    """
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
    """Where a recipe transcribes otherwise than its folder.

    Arguments
    ---------
    rows : sequence of Row
        The recipe's.
    texts : sequence of tuple of str
        The folder's, of the same utterances.

    Returns
    -------
    str or None
        One line; None where both are the same.

    Example
    -------
    >>> print(difference([Row("u", ("A",), ("B",))], [("A",)]))
    The recipe decodes otherwise than its inference folder, which decodes \
greedily: utterance u is 'B' in the recipe and 'A' in the folder. The folder's \
own WER is in the report.
    """
    if same_text(rows, texts):
        return None
    for row, text in zip(rows, as_scored(rows, texts), strict=True):
        heard = _spaced(" ".join(row.hypothesis))
        if heard != text:
            return (
                "The recipe decodes otherwise than its inference folder, "
                f"which decodes greedily: utterance {row.id} is "
                f"{short(heard)} in the recipe and {short(text)} in the "
                "folder. The folder's own WER is in the report."
            )
    return None


def _spaced(text: str) -> str:
    return " ".join(text.split())


#: What a recipe's tokens may be: words, labels, labels with ``_`` for spaces.
_READINGS = (
    " ".join,
    "".join,
    lambda tokens: "".join(" " if t == SPACE else t for t in tokens),
)


def as_scored(
    rows: Sequence[Row], texts: Iterable[tuple[str, ...]]
) -> list[str]:
    """Transcripts of the folder in the tokens that the recipe scores.

    Arguments
    ---------
    rows : sequence of Row
        The recipe's, which say whether it scores characters or words.
    texts : iterable of tuple of str
        The folder's.

    Returns
    -------
    list of str
        Tokens, with a space between.

    Example
    -------
    >>> as_scored([Row("u", ("AB", "A"), ())], [("A", "B", " ", "A")])
    ['AB A']
    >>> as_scored([Row("u", ("A", "_", "A"), ())], [("A", "B", " ", "A")])
    ['A B _ A']
    """
    plain = [_spaced("".join(text)) for text in texts]
    tokens = {t for row in rows for t in (*row.reference, *row.hypothesis)}
    if any(len(token) > 1 for token in tokens):
        return plain
    if SPACE in tokens:
        plain = [text.replace(" ", SPACE) for text in plain]
    return [" ".join(text) for text in plain]


# -- what labels can write -----------------------------------------------------


@dataclass(frozen=True)
class Uncovered:
    """Reference words with characters that no label yields.

    Arguments
    ---------
    words, total : int
        Such words, and all.
    id : str
        The first utterance with one.
    characters : str
        Their characters.
    """

    words: int
    total: int
    id: str
    characters: str

    @property
    def percent(self) -> float:
        """Their share."""
        return 100 * self.words / self.total


def find_uncovered(
    rows: Sequence[Row], tokenizer: Tokenizer
) -> Uncovered | None:
    """Reference words that a recognizer can never write.

    Arguments
    ---------
    rows : sequence of Row
        What the recipe's metric has scored.
    tokenizer : CTCTextEncoder or SentencePieceProcessor
        The recipe's.

    Returns
    -------
    Uncovered or None
        None where there is no such word; where nothing was recognized, or
        something that the labels do not yield either: then the recipe changes
        what it decodes, and its labels say nothing.

    Example
    -------
    >>> encoder = CTCTextEncoder()
    >>> encoder.update_from_iterable("AB", sequence_input=False)
    >>> find_uncovered([Row("u", ("ab", "A"), ("A",))], encoder)
    Uncovered(words=1, total=2, id='u', characters='ab')
    """
    known = _written(tokenizer)
    heard = {c for row in rows for token in row.hypothesis for c in token}
    heard -= {SPACE, " "}
    if known is None or not heard or not heard <= known:
        return None
    known |= {SPACE, " "}
    words = [(row.id, token) for row in rows for token in row.reference]
    bad = [(name, word) for name, word in words if not set(word) <= known]
    if not bad:
        return None
    name = bad[0][0]
    said = {c for other, word in bad if other == name for c in word}
    characters = "".join(sorted(said - known))
    return Uncovered(len(bad), len(words), name, characters)


def _written(tokenizer: Tokenizer) -> set[str] | None:
    """Characters that labels yield; None where bytes can spell anything."""
    if isinstance(tokenizer, CTCTextEncoder):
        special = {
            getattr(tokenizer, f"{name}_label", None)
            for name in ("blank", "unk", "bos", "eos")
        }
        labels = [x for x in tokenizer.lab2ind if x not in special]
        return {c for label in labels for c in str(label)}
    ids = range(tokenizer.get_piece_size())
    if any(map(tokenizer.is_byte, ids)):
        return None
    pieces = [
        tokenizer.id_to_piece(i)
        for i in ids
        if not (tokenizer.is_control(i) or tokenizer.is_unknown(i))
    ]
    return {c for piece in pieces for c in piece.replace("\u2581", " ")}
