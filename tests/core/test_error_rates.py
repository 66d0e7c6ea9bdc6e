"""Error rates and bootstrap intervals."""

import random
from functools import partial

import jiwer
import numpy as np
import pytest
from speechbrain.utils.metric_stats import ErrorRateStats

from speechbrain_stablequant.core import error_rates
from speechbrain_stablequant.core.error_rates import (
    Transcript,
    paired_delta,
    paired_interval,
    score,
)


def corpus(error_seed, num_utterances=40, error_rate=0.2):
    """The same references for each seed, with other errors."""
    texts, errors = random.Random(7), random.Random(error_seed)
    vocabulary = ["".join(texts.choices("ABCDE", k=4)) for _ in range(50)]
    transcripts = []
    for index in range(num_utterances):
        words = texts.choices(vocabulary, k=texts.randint(1, 12))
        heard = []
        for word in words:
            if errors.random() < error_rate:
                # a deletion, a substitution or an insertion
                heard += errors.choice([[], ["XYZ"], [word, "OH"]])
            else:
                heard.append(word)
        transcripts.append(
            Transcript(f"u{index}", " ".join(words), " ".join(heard))
        )
    return transcripts


def test_score_counts_by_hand():
    rates = score(
        [
            Transcript("a", "A B C", "A X C D"),  # 1 substitution, 1 insertion
            Transcript("b", "ONE TWO", "TWO"),  # 1 deletion
            Transcript("c", "YES", "YES"),
        ]
    )
    assert rates.to_dict() == {
        "WER": 50.0,
        "CER": pytest.approx(100 * (1 + 2 + 4) / (5 + 7 + 3)),
        "utterances": 3,
        "words": 6,
        "substitutions": 1,
        "deletions": 1,
        "insertions": 1,
        "characters": 15,
    }


def test_characters_are_those_of_jiwer():
    rates = score([Transcript("1", "one  two ", "one two")])
    expected = 100 * jiwer.cer("one  two ", "one two")
    assert rates.cer == pytest.approx(expected) and expected > 0


def test_score_is_jiwer_corpus_rate_and_not_the_mean_of_utterances():
    transcripts = corpus(1)
    references = [item.reference for item in transcripts]
    hypotheses = [item.hypothesis for item in transcripts]
    rates = score(transcripts)
    assert rates.wer == pytest.approx(100 * jiwer.wer(references, hypotheses))
    assert rates.cer == pytest.approx(100 * jiwer.cer(references, hypotheses))
    mean = np.mean([score([item]).wer for item in transcripts])
    assert abs(rates.wer - mean) > 0.1


def test_empty_hypothesis_deletes_everything():
    rates = score([Transcript("a", "ONE TWO", ""), Transcript("b", "X", " ")])
    assert (rates.wer, rates.cer) == (100.0, 100.0)
    assert (rates.deletions, rates.words) == (3, 3)


def test_spaces_around_and_between_words_are_no_word_errors():
    rates = score([Transcript("a", " ONE  TWO ", "ONE TWO")])
    assert (rates.wer, rates.words) == (0.0, 2)


@pytest.mark.parametrize("reference", ["", "  "])
def test_an_empty_reference_counts_its_insertions(reference):
    """As SpeechBrain's ErrorRateStats: no words, and all that is recognized
    counts against the words of the whole set."""
    transcripts = [
        Transcript("a", "ONE TWO", "ONE TWO"),
        Transcript("silence", reference, " OH  NO "),
        Transcript("b", "THREE FOUR", "THREE"),
    ]
    rates = score(transcripts)
    assert (rates.words, rates.insertions, rates.deletions) == (4, 2, 1)
    assert (rates.characters, rates.cer) == (17, 100 * (5 + 5) / 17)
    stats = ErrorRateStats()
    for item in transcripts:
        rows = [[text.split()] for text in (item.hypothesis, item.reference)]
        stats.append([item.id], *rows)
    assert rates.wer == stats.summarize("WER") == 75.0


def test_bootstrap_with_empty_references():
    """A resample without a word has no rate and is left out."""
    baseline = [Transcript("a", "ONE TWO", "ONE TWO"), Transcript("b", "", "")]
    other = [Transcript("a", "ONE TWO", "ONE"), Transcript("b", "", "OH")]
    delta, low, high = paired_delta(baseline, other)
    # One draw in four has no word; the others have 2 errors in 4 or 2 words.
    assert (delta, low, high) == (100, 50, 100)
    # The first draw has none.
    single = paired_interval(np.array([1, 1]), np.array([2, 0]), 1)
    assert single == (100, 100, 100)


@pytest.mark.parametrize("references", [["", " "], []])
def test_no_reference_has_a_word(references):
    transcripts = [Transcript(text, text, "A") for text in references]
    for call in (score, lambda x: paired_delta(x, x)):
        with pytest.raises(ValueError, match="none of the set's") as error:
            call(transcripts)
        assert "\n" not in str(error.value)


def test_an_interval_does_not_depend_on_the_order():
    baseline, other = corpus(1), corpus(2)
    turned = paired_delta(baseline[::-1], other[::-1])
    assert turned == paired_delta(baseline, other)


@pytest.mark.parametrize("unit", ["word", "char"])
def test_bootstrap_equals_a_direct_loop(unit, monkeypatch):
    fewer = partial(paired_interval, num_resamples=200)
    monkeypatch.setattr(error_rates, "paired_interval", fewer)
    baseline, other = corpus(1), corpus(2)
    rate = {"word": jiwer.wer, "char": jiwer.cer}[unit]

    def percent(transcripts):
        return 100 * rate(
            [item.reference for item in transcripts],
            [item.hypothesis for item in transcripts],
        )

    generator = np.random.default_rng(0)
    by_id = [sorted(x, key=lambda row: row.id) for x in (baseline, other)]
    deltas = []
    for _ in range(200):
        drawn = generator.integers(len(baseline), size=len(baseline))
        before, after = (percent([x[i] for i in drawn]) for x in by_id)
        deltas.append(after - before)
    expected = np.percentile(deltas, [2.5, 97.5])
    result = paired_delta(baseline, other, unit)
    assert result.delta == pytest.approx(percent(other) - percent(baseline))
    assert (result.low, result.high) == pytest.approx(tuple(expected))
    assert result.low < result.delta < result.high


@pytest.mark.parametrize("max_draws", [1, 30, 400])
def test_chunks_change_memory_and_not_the_result(max_draws, monkeypatch):
    extra, lengths = np.arange(-5, 6), np.arange(1, 12)
    whole = paired_interval(extra, lengths, 100)
    monkeypatch.setattr(error_rates, "_MAX_DRAWS", max_draws)
    assert paired_interval(extra, lengths, 100) == whole


def test_bootstrap_of_a_known_distribution():
    # 100 one-word utterances of which 20 are newly wrong: a resample's rise
    # is binomial(100, 0.2), whose 95 % range is 12 to 28 points.
    baseline = [Transcript(str(i), "A", "A") for i in range(100)]
    other = [
        Transcript(str(i), "A", "B" if i < 20 else "A") for i in range(100)
    ]
    delta, low, high = paired_delta(baseline, other)
    assert delta == pytest.approx(20)
    assert low == pytest.approx(12, abs=1)
    assert high == pytest.approx(28, abs=1)


def test_bootstrap_is_paired():
    # Very different utterances, yet always exactly one more error in ten
    # words: paired resampling knows the difference without any doubt.
    reference = "A B C D E F G H I J"
    baseline, other = [], []
    for index in range(10):
        words = reference.split()
        baseline.append(
            Transcript(str(index), reference, " ".join(words[:index]))
        )
        other.append(
            Transcript(str(index), reference, " ".join(words[: index - 1]))
            if index
            else Transcript("0", reference, "X Y Z P Q R S T U V W")
        )
    result = paired_delta(baseline, other)
    assert result.delta == pytest.approx(10)
    assert result.high - result.low < 1e-9


def test_bootstrap_of_a_system_with_itself_and_its_mirror():
    one, two = corpus(1), corpus(2)
    assert paired_delta(one, one) == (0, 0, 0)
    there = paired_delta(one, two)
    back = paired_delta(two, one)
    assert back == pytest.approx((-there.delta, -there.high, -there.low))
    assert there == paired_delta(one, two)


def test_a_higher_level_is_wider():
    extra, lengths = np.arange(-5, 6), np.arange(1, 12)
    narrow, wide = (
        paired_interval(extra, lengths, 999, level) for level in (0.5, 0.99)
    )
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    "other, name",
    [
        ([("a", "ONE"), ("c", "TWO")], "b"),
        ([("a", "ONE")], "b"),
        ([("a", "ONE"), ("b", "TWO"), ("c", "THREE")], "c"),
        ([("a", "ONE"), ("b", "TOO")], "b"),
    ],
)
def test_bootstrap_refuses_sets_that_do_not_match(other, name):
    baseline = [Transcript("a", "ONE", "ONE"), Transcript("b", "TWO", "TWO")]
    with pytest.raises(ValueError, match=f"utterance '{name}': ") as error:
        paired_delta(baseline, [Transcript(i, t, t) for i, t in other])
    assert "\n" not in str(error.value)
