"""Word and character error rates in percent, and paired confidence intervals.

A search reads the counts of the recipe's ``ErrorRateStats``. A report counts
the same edits with jiwer: characters would take ``ErrorRateStats`` minutes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Literal, NamedTuple

import jiwer
import numpy as np

Unit = Literal["word", "char"]

#: Float error rates, in percent, above which a comparison says nothing.
MOST_RECOGNIZED = 90.0

# Upper bound on the random indices held at once: 32 MB of int64.
_MAX_DRAWS = 1 << 22


@dataclass(frozen=True)
class Transcript:
    id: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class ErrorRates:
    """Corpus-level error rates in percent, with the counts of words."""

    wer: float
    cer: float
    utterances: int
    words: int
    substitutions: int
    deletions: int
    insertions: int
    characters: int

    def to_dict(self) -> dict[str, float | int]:
        names = {"wer": "WER", "cer": "CER"}
        return {names.get(k, k): v for k, v in asdict(self).items()}


class DeltaInterval(NamedTuple):
    """A difference of error rates and its confidence interval, in points."""

    delta: float
    low: float
    high: float


def score(transcripts: Sequence[Transcript]) -> ErrorRates:
    """Counts the errors of a set; all is inserted for an empty reference."""
    words = count_errors(transcripts, "word").sum(axis=0)
    chars = count_errors(transcripts, "char").sum(axis=0)
    return ErrorRates(
        float(100 * words[1:].sum() / words[0]),
        float(100 * chars[1:].sum() / chars[0]),
        len(transcripts),
        *words.tolist(),
        int(chars[0]),
    )


def paired_delta(
    baseline: Sequence[Transcript],
    other: Sequence[Transcript],
    unit: Unit = "word",
) -> DeltaInterval:
    """The difference of WERs or CERs, by a paired bootstrap over utterances
    (Bisani and Ney, ICASSP 2004)."""
    for one, two in zip_longest(baseline, other):
        same = one and two and one.reference == two.reference
        if not same or one.id != two.id:
            raise ValueError(
                f"utterance {(one or two).id!r}: the two evaluations do not "
                "have it in the same place, with the same reference"
            )
    # The same resamples for any order of the set.
    order = np.argsort([row.id for row in baseline], kind="stable")
    before = count_errors(baseline, unit)[order]
    after = count_errors(other, unit)[order]
    # The references are the same, so the difference of the rates is the rate
    # of the differences, and one sum serves both systems.
    extra = after[:, 1:].sum(axis=1) - before[:, 1:].sum(axis=1)
    return paired_interval(extra, before[:, 0])


def paired_interval(
    extra: np.ndarray,
    lengths: np.ndarray,
    num_resamples: int = 10000,
    level: float = 0.95,
) -> DeltaInterval:
    """Returns 100 * sum(extra) / sum(lengths) with its bootstrap interval."""
    delta = 100 * extra.sum() / lengths.sum()
    generator = np.random.default_rng(0)
    size = len(lengths)
    deltas = np.empty(num_resamples)
    # The stream is consumed row by row: the chunk does not change the result.
    rows = max(1, _MAX_DRAWS // size)
    for start in range(0, num_resamples, rows):
        part = deltas[start : start + rows]
        drawn = generator.integers(size, size=(len(part), size))
        sums = extra[drawn].sum(axis=1), lengths[drawn].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            part[:] = 100 * sums[0] / sums[1]
    # A resample of empty references alone has no rate.
    deltas = deltas[np.isfinite(deltas)]
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(
        deltas if deltas.size else [delta], [tail, 100 - tail]
    )
    return DeltaInterval(float(delta), float(low), float(high))


def count_errors(transcripts: Sequence[Transcript], unit: Unit) -> np.ndarray:
    """Reference length, substitutions, deletions, insertions by utterance."""
    align = jiwer.process_words if unit == "word" else jiwer.process_characters
    rows = []
    for item in transcripts:
        if item.reference.strip():
            found = align(item.reference, item.hypothesis)
            kinds = (found.substitutions, found.deletions, found.insertions)
            rows.append((len(found.references[0]), *kinds))
            continue
        # jiwer takes no empty reference; all that was recognized is inserted.
        words = item.hypothesis.split()
        inserted = len(words if unit == "word" else " ".join(words))
        rows.append((0, 0, 0, inserted))
    if not any(row[0] for row in rows):
        raise ValueError(
            f"none of the set's {len(rows)} references holds a word; check "
            "what the recipe's metric gets as its references"
        )
    return np.array(rows, dtype=np.int64)
