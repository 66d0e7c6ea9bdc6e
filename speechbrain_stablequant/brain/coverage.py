"""Which reference words the labels of a recognizer can write."""

from collections.abc import Sequence
from dataclasses import dataclass

from speechbrain.dataio.encoder import CTCTextEncoder

from .metrics import Row
from .tokenizer import SPACE, Tokenizer

#: Maximum percentage of reference words that labels cannot write.
MOST_UNCOVERED = 50.0


@dataclass(frozen=True)
class Uncovered:
    """Reference words with characters that no label yields."""

    words: int
    total: int
    #: The first utterance with such a word, and its characters.
    id: str
    characters: str

    @property
    def percent(self) -> float:
        """Share of such words."""
        return 100 * self.words / self.total


def find_uncovered(
    rows: Sequence[Row], tokenizer: Tokenizer
) -> Uncovered | None:
    """Find reference words that a recognizer can never write.

    Returns None also if nothing was recognized, or something that no label
    yields: then the recipe postprocesses, and its labels say nothing.
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
    """Characters of all labels; None if byte pieces can spell anything."""
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


def check_references(
    rows: Sequence[Row], tokenizer: Tokenizer | None, name: str, limit: float
) -> str | None:
    """A warning about reference words that the labels cannot write, or None.

    Raises if most words are such, unless ``limit``, the maximum float WER, is
    100 or more.
    """
    found = None if tokenizer is None else find_uncovered(rows, tokenizer)
    if found is None:
        return None
    example = (
        f"utterance {found.id} has {found.characters!r}, which no label of the "
        "recipe's tokenizer yields"
    )
    if found.percent > MOST_UNCOVERED and limit < 100:
        raise ValueError(
            f"quantize: {name}: {example}, as {found.words} of {found.total} "
            "words do; write the "
            "transcripts as the labels are written (case, punctuation), or "
            "set quantize.search.max_float_wer to 100 or more"
        )
    return (
        f"Of the words of {name} {found.words} of {found.total} cannot be "
        f"recognized: {example}."
    )
