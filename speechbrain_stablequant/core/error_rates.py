"""Error rates, their confidence intervals, speed and size.

Plain functions of transcripts and numbers. Rates are in percent, differences in
percentage points, sizes in bytes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jiwer
import numpy as np

Unit = Literal["word", "char"]

BYTES_PER_SCALE = 4  # scales are stored in fp32

# Upper bound on the random indices held at once: 32 MB of int64.
_MAX_DRAWS = 1 << 22


@dataclass(frozen=True)
class Transcript:
    """Reference and hypothesis of one utterance."""

    id: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class ErrorRates:
    """Corpus-level word and character error rates in percent, with their
    counts."""

    wer: float
    cer: float
    utterances: int
    words: int
    substitutions: int
    deletions: int
    insertions: int
    characters: int
    character_substitutions: int
    character_deletions: int
    character_insertions: int

    def to_dict(self) -> dict[str, float | int]:
        """Returns the rates as in ``report.json``."""
        return {
            "WER": self.wer,
            "CER": self.cer,
            "utterances": self.utterances,
            "words": self.words,
            "substitutions": self.substitutions,
            "deletions": self.deletions,
            "insertions": self.insertions,
            "characters": self.characters,
        }


class DeltaInterval(NamedTuple):
    """A difference of error rates and its confidence interval, in points."""

    delta: float
    low: float
    high: float


def score(transcripts: Sequence[Transcript]) -> ErrorRates:
    """Counts word and character errors of a set, as jiwer does, without
    normalization.

    An empty reference has no words; what was recognized there counts as
    inserted.
    """
    words = _count_errors(transcripts, "word").sum(axis=0)
    chars = _count_errors(transcripts, "char").sum(axis=0)
    return ErrorRates(
        wer=float(100 * words[1:].sum() / words[0]),
        cer=float(100 * chars[1:].sum() / chars[0]),
        utterances=len(transcripts),
        words=int(words[0]),
        substitutions=int(words[1]),
        deletions=int(words[2]),
        insertions=int(words[3]),
        characters=int(chars[0]),
        character_substitutions=int(chars[1]),
        character_deletions=int(chars[2]),
        character_insertions=int(chars[3]),
    )


def bootstrap_delta_wer(
    baseline: Sequence[Transcript],
    other: Sequence[Transcript],
    num_resamples: int = 10000,
    level: float = 0.95,
    seed: int = 0,
    unit: Unit = "word",
) -> DeltaInterval:
    """Returns the difference of two systems' error rates with a confidence
    interval.

    Paired bootstrap over utterances with a percentile interval, after Bisani
    and Ney, "Bootstrap estimates for confidence intervals in ASR performance
    evaluation", ICASSP 2004. Pairing leaves only the uncertainty of the
    difference.
    """
    _check_paired(baseline, other)
    before = _count_errors(baseline, unit)
    after = _count_errors(other, unit)
    lengths = before[:, 0]
    # The references are the same, so the difference of the rates is the rate
    # of the differences, and one sum serves both systems.
    extra = after[:, 1:].sum(axis=1) - before[:, 1:].sum(axis=1)
    return paired_interval(extra, lengths, num_resamples, level, seed)


def paired_interval(
    extra: np.ndarray,
    lengths: np.ndarray,
    num_resamples: int = 10000,
    level: float = 0.95,
    seed: int = 0,
) -> DeltaInterval:
    """Returns 100 * sum(extra) / sum(lengths) with its bootstrap interval."""
    if num_resamples < 1:
        raise ValueError(
            f"num_resamples must be at least 1, not {num_resamples}"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    delta = 100 * extra.sum() / lengths.sum()
    deltas = _resampled_ratios(extra, lengths, num_resamples, seed)
    # A resample of empty references alone has no rate.
    deltas = deltas[np.isfinite(deltas)] if lengths.min() == 0 else deltas
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(
        deltas if deltas.size else [delta], [tail, 100 - tail]
    )
    return DeltaInterval(float(delta), float(low), float(high))


def paired_error(extra: np.ndarray, lengths: np.ndarray) -> float:
    """Returns the standard error of a difference of error rates, in points.

    Linear approximation for a ratio of two sums over utterances.
    """
    residuals = extra - lengths * (extra.sum() / lengths.sum())
    count = len(lengths)
    variance = (residuals**2).sum() / (count - 1)
    return float(100 * math.sqrt(variance / count) / lengths.mean())


def real_time_factor(seconds_compute: float, seconds_audio: float) -> float:
    """Returns computing time divided by the duration of the audio."""
    if not (math.isfinite(seconds_audio) and seconds_audio > 0):
        raise ValueError(
            f"seconds_audio must be greater than 0, not {seconds_audio}"
        )
    if not (math.isfinite(seconds_compute) and seconds_compute >= 0):
        raise ValueError(
            f"seconds_compute must be 0 or more, not {seconds_compute}"
        )
    return seconds_compute / seconds_audio


def size_on_disk(
    entries: Iterable[tuple[int, float]], num_scales: int = 0
) -> int:
    """Returns the bytes of tensors given as (number of values, bits per
    value)."""
    if num_scales < 0:
        raise ValueError(f"num_scales must be 0 or more, not {num_scales}")
    total = num_scales * BYTES_PER_SCALE
    for index, (numel, bits) in enumerate(entries):
        if numel < 0 or not (math.isfinite(bits) and bits > 0):
            raise ValueError(
                f"entry {index}: {numel} values of {bits} bits have no size; "
                f"give a count of 0 or more and bits above 0"
            )
        total += math.ceil(numel * bits / 8)
    return total


def _count_errors(transcripts: Sequence[Transcript], unit: Unit) -> np.ndarray:
    """Reference length, substitutions, deletions and insertions by
    utterance."""
    if unit not in ("word", "char"):
        raise ValueError(f"unit must be 'word' or 'char', not {unit!r}")
    if not transcripts:
        raise ValueError("no transcripts to score: the set is empty")
    spoken = [bool(item.reference.strip()) for item in transcripts]
    if not any(spoken):
        raise ValueError(
            f"no reference of the set holds a word (utterance "
            f"{transcripts[0].id!r} is the first of {len(spoken)}); check "
            "what the recipe's metric gets as its references"
        )
    counts = np.zeros((len(transcripts), 4), dtype=np.int64)
    # jiwer takes no empty reference; all that was recognized is inserted.
    counts[:, 3] = [
        0 if heard else _count_units(item.hypothesis, unit)
        for item, heard in zip(transcripts, spoken, strict=True)
    ]
    align = jiwer.process_words if unit == "word" else jiwer.process_characters
    scored = [t for t, heard in zip(transcripts, spoken, strict=True) if heard]
    result = align(
        [item.reference for item in scored],
        [item.hypothesis for item in scored],
    )
    counts[spoken, 0] = [len(tokens) for tokens in result.references]
    column = {"substitute": 1, "delete": 2, "insert": 3}
    rows = [counts[index] for index in np.flatnonzero(spoken)]
    for row, chunks in zip(rows, result.alignments, strict=True):
        for chunk in chunks:
            if chunk.type != "equal":
                # A deletion has no length in the hypothesis, an insertion
                # none in the reference.
                row[column[chunk.type]] += max(
                    chunk.ref_end_idx - chunk.ref_start_idx,
                    chunk.hyp_end_idx - chunk.hyp_start_idx,
                )
    return counts


def _count_units(text: str, unit: Unit) -> int:
    """Words of a text, or its characters as jiwer counts them."""
    words = text.split()
    return len(words) if unit == "word" else len(" ".join(words))


def _check_paired(
    baseline: Sequence[Transcript], other: Sequence[Transcript]
) -> None:
    """Raises unless both lists hold the same utterances in the same order."""
    for index, (one, two) in enumerate(zip(baseline, other, strict=False)):
        if one.id != two.id:
            raise ValueError(
                f"utterance {index} is {one.id!r} in the baseline and "
                f"{two.id!r} in the other; give both in the same order"
            )
        if one.reference != two.reference:
            raise ValueError(
                f"utterance {one.id!r} has two different references; score "
                f"both systems against the same text"
            )
    if len(baseline) != len(other):
        longer = max(baseline, other, key=len)
        missing = longer[min(len(baseline), len(other))].id
        raise ValueError(
            f"utterance {missing!r} was recognized by one system only; "
            f"give both the same utterances"
        )


def _resampled_ratios(
    extra: np.ndarray,
    lengths: np.ndarray,
    num_resamples: int,
    seed: int,
    max_draws: int = _MAX_DRAWS,
) -> np.ndarray:
    """100 * sum(extra) / sum(lengths) over resampled utterances; NaN where the
    lengths are 0.

    The random stream is consumed row by row: the chunk size does not change the
    result.
    """
    generator = np.random.default_rng(seed)
    size = len(lengths)
    rows = max(1, max_draws // size)
    ratios = np.empty(num_resamples)
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        drawn = generator.integers(size, size=(stop - start, size))
        sums = extra[drawn].sum(axis=1), lengths[drawn].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios[start:stop] = 100 * sums[0] / sums[1]
    return ratios
