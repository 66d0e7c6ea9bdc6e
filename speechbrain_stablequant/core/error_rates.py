"""What a report states: error rates, their uncertainty, speed and size.

Plain functions of transcripts and numbers. Nothing here knows SpeechBrain or
a model. Rates are in percent, differences in percentage points, sizes in
bytes (1 MB is 1e6 bytes).
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
    """What was said and what was recognized in one utterance.

    Arguments
    ---------
    id : str
        The utterance.
    reference : str
        What was said.
    hypothesis : str
        What was recognized. May be empty.
    """

    id: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class ErrorRates:
    """Corpus-level error rates with the counts that they come from.

    Arguments
    ---------
    wer, cer : float
        Word and character error rate in percent: all errors of the set
        divided by all reference words (characters) of the set.
    utterances, words, characters : int
        How much was compared, counted in the references.
    substitutions, deletions, insertions : int
        Word errors.
    character_substitutions, character_deletions, character_insertions : int
        Character errors.
    """

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
        """The rates as they stand in ``report.json``.

        Returns
        -------
        dict
            WER and CER in percent and the counts of words.
        """
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
    """Counts word and character errors of a set, as jiwer does.

    Words are what spaces separate. Characters include the spaces between
    words, without those at the ends of the text. Nothing is normalized: case
    and punctuation count.

    Arguments
    ---------
    transcripts : Sequence[Transcript]
        The set. An empty reference has no words: what was recognized there
        is inserted, and counts against the words of the whole set.

    Returns
    -------
    ErrorRates
        The rates of the whole set.

    Raises
    ------
    ValueError
        No utterance, or no reference with a word.

    Example
    -------
    >>> rates = score([
    ...     Transcript("a", "THE CAT SAT", "THE CAT"),
    ...     Transcript("b", "YES", "YES"),
    ... ])
    >>> rates.wer, rates.deletions, rates.words
    (25.0, 1, 4)
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
    """Difference of two systems' error rates, with a confidence interval.

    Paired bootstrap over utterances with a percentile interval, after Bisani
    and Ney, "Bootstrap estimates for confidence intervals in ASR performance
    evaluation", ICASSP 2004. Both systems are resampled together, because an
    utterance that is hard for one is hard for the other: what remains is the
    uncertainty of the difference alone.

    Arguments
    ---------
    baseline : Sequence[Transcript]
        One system's transcripts, here the float model's.
    other : Sequence[Transcript]
        The other's, with the same utterances in the same order.
    num_resamples : int
        How often the set is drawn anew.
    level : float
        The interval's coverage, between 0 and 1.
    seed : int
        The same seed gives the same interval.
    unit : str
        ``"word"`` for WER, ``"char"`` for CER.

    Returns
    -------
    DeltaInterval
        ``(delta, low, high)``: rate(other) - rate(baseline) on the set and
        the ends of its interval, in percentage points.

    Example
    -------
    >>> float_model = [Transcript("a", "ONE TWO THREE FOUR", "ONE TWO THREE")]
    >>> quantized = [Transcript("a", "ONE TWO THREE FOUR", "ONE TWO")]
    >>> tuple(bootstrap_delta_wer(float_model, quantized, num_resamples=10))
    (25.0, 25.0, 25.0)
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
    """A sum of differences over a sum of lengths, with its interval.

    Arguments
    ---------
    extra : np.ndarray
        What one system has more than the other, by utterance.
    lengths : np.ndarray
        Length of each utterance, such as its words.
    num_resamples : int
        How often the set is drawn anew.
    level : float
        The interval's coverage, between 0 and 1.
    seed : int
        The same seed gives the same interval.

    Returns
    -------
    DeltaInterval
        In percent of the lengths.

    Example
    -------
    >>> tuple(paired_interval(np.array([1, 1]), np.array([4, 4])))
    (25.0, 25.0, 25.0)
    """
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
    """Standard error of a difference of error rates, from pairs.

    With so many times as many utterances it is smaller by the square root of
    that number.

    Arguments
    ---------
    extra : np.ndarray
        Word errors that one system has more than the other, by utterance.
    lengths : np.ndarray
        Words of each utterance.

    Returns
    -------
    float
        In points. The rate is a ratio of two sums over utterances, both of
        which vary: this is its linear approximation.

    Example
    -------
    >>> round(paired_error(np.array([1, -1, 1, -1]), np.full(4, 10)), 3)
    5.774
    """
    residuals = extra - lengths * (extra.sum() / lengths.sum())
    count = len(lengths)
    variance = (residuals**2).sum() / (count - 1)
    return float(100 * math.sqrt(variance / count) / lengths.mean())


def real_time_factor(seconds_compute: float, seconds_audio: float) -> float:
    """Computing time for each second of audio; below 1 is faster than speech.

    Arguments
    ---------
    seconds_compute : float
        How long recognition took.
    seconds_audio : float
        How long the audio lasts, without padding.

    Returns
    -------
    float
        The ratio.

    Example
    -------
    >>> real_time_factor(seconds_compute=2.0, seconds_audio=10.0)
    0.2
    """
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
    """Bytes that a model's tensors take in a file, without its small header.

    Weights of b bits are packed, b bits each; each tensor starts on a whole
    byte. What stays in floating point enters with 32 bits.

    Arguments
    ---------
    entries : Iterable[tuple[int, float]]
        For each tensor its number of values and the bits of one value.
    num_scales : int
        How many scales are stored, at 4 bytes each.

    Returns
    -------
    int
        The size. Divide by 1e6 for MB.

    Example
    -------
    >>> size_on_disk([(1000, 6), (10, 32)], num_scales=5)
    810
    """
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
    """Reference length, substitutions, deletions, insertions by utterance."""
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
    """Both lists must hold the same utterances in the same order."""
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
    """100 * sum(extra) / sum(lengths) over utterances drawn with replacement;
    not a number where the lengths are 0.

    The generator's stream is consumed row by row: the chunk size changes the
    memory taken and not the result.
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
