"""Tests of speechbrain_stablequant.methods.search, on invented recognizers."""

import json
import math
import random

import pytest

from speechbrain_stablequant.config import SearchConfig
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import UnitPlan
from speechbrain_stablequant.methods.search.journal import (
    Journal,
    evaluation_key,
)
from speechbrain_stablequant.methods.search.percentile import (
    best_percentile,
    search_percentiles,
    surest_percentile,
)
from speechbrain_stablequant.methods.search.score import Score
from speechbrain_stablequant.methods.search.sensitivity import select_units
from speechbrain_stablequant.utils.store import Store

GRID = (100.0, 99.9, 99.5, 99.0, 98.0)
UNITS = ("conv.0", "conv.1", "block.0", "head")


def quantize_unit(unit, ratio):
    """Two layers in each unit; the ratio is their amax."""
    return {f"{unit}.{i}": LayerQuant(8, 8, ratio) for i in "ab"}


def select(evaluate, threshold=0.25, rule="threshold"):
    """Step 1 for all units, each quantized alone."""
    units = {unit: quantize_unit(unit, 100.0) for unit in UNITS}
    search = SearchConfig(threshold=threshold, selection=rule)
    return select_units(units, evaluate, search)


def cut(units, evaluate, grid=GRID, rule="threshold"):
    """Step 2 for units by name."""
    plans = [UnitPlan(unit, selected=True) for unit in units]
    search = SearchConfig(cutoffs=grid, selection=rule)
    return search_percentiles(plans, quantize_unit, evaluate, search)


class Fake:
    """Evaluates by a function of the quantized layers, and notes the calls.

    ``landscape`` gives errors of each batch and a loss, ``pruned`` heeds
    ``give_up_above``, and ``dies_after`` so many calls the run is killed.
    """

    def __init__(self, landscape, words=400, pruned=True, dies_after=None):
        self.landscape = landscape
        self.words = words
        self.pruned = pruned
        self.dies_after = dies_after
        self.calls = []

    def __call__(self, quants, start=None, give_up_above=None, label=""):
        if len(self.calls) == self.dies_after:
            raise KeyboardInterrupt
        self.calls.append((dict(quants), start, give_up_above, label))
        batches, loss = self.landscape(quants)
        errors, complete = 0, True
        for index, count in enumerate(batches):
            errors += count
            beaten = give_up_above is not None and errors > give_up_above
            if self.pruned and beaten:
                complete = index + 1 == len(batches)
                break
        return Score(errors, self.words, loss, complete)


def random_landscape(seed):
    """Few values, so that ties of errors and of losses are common."""

    def landscape(quants):
        rows = sorted((n, q.activation_amax) for n, q in quants.items())
        draw = random.Random(f"{seed} {rows}")
        errors = [draw.randrange(3) for _ in range(3)]
        return errors, draw.choice([0.5, 1.0, math.inf])

    return landscape


def constant(errors, loss=1.0):
    return lambda quants: ([errors], loss)


# -- selection -----------------------------------------------------------------


def rising(rises, baseline=10):
    """Errors of a model where each unit has a rise of its own."""

    def landscape(quants):
        units = {name.rpartition(".")[0] for name in quants}
        return [baseline + sum(rises.get(unit, 0) for unit in units)], 1.0

    return landscape


def test_each_unit_is_measured_alone():
    fake = Fake(constant(1))
    select(fake)
    assert [(quants, start) for quants, start, _, _ in fake.calls] == [
        ({}, None),
        *((quantize_unit(unit, 100.0), unit) for unit in UNITS),
    ]
    # The exact rise is reported: none is given up.
    assert {limit for _, _, limit, _ in fake.calls} == {None}


def test_selection_threshold_is_strict():
    """One error in 400 words is exactly 0.25 points."""
    rises = {"conv.0": 1, "conv.1": 2, "block.0": 0, "head": -3}
    fake = Fake(rising(rises), words=400)
    baseline, found = select(fake)
    assert baseline.wer == 2.5
    assert [row.name for row in found] == list(UNITS)
    assert [row.delta_wer for row in found] == [0.25, 0.5, 0.0, -0.75]
    assert [row.selected for row in found] == [False, True, False, False]
    assert [4 * row.wer for row in found] == [11, 12, 10, 7]


@pytest.mark.parametrize("words, baseline", [(2400, 91), (3600, 35)])
def test_selection_threshold_is_strict_for_every_set(words, baseline):
    """A quarter of a point is a quarter of a point, whatever the rounding of
    the two rates is."""
    fake = Fake(rising({"head": words // 400}, baseline), words)
    _, found = select(fake)
    assert [row.selected for row in found] == [False] * 4


def test_threshold_zero_selects_any_rise():
    fake = Fake(rising({"conv.1": 1}), words=100000)
    _, found = select(fake, 0)
    assert [row.name for row in found if row.selected] == ["conv.1"]


# -- cut-offs ------------------------------------------------------------------


def test_decisions_are_kept_and_later_units_float():
    best = {"conv.0": 99.5, "block.0": 100.0, "head": 98.0}

    def landscape(quants):
        *_, last = quants.items()
        unit = last[0].rpartition(".")[0]
        return [0 if last[1].activation_amax == best[unit] else 5], 1.0

    fake = Fake(landscape)
    found = cut(best, fake)
    assert {row.name: row.cutoff for row in found} == best
    calls = iter(fake.calls)
    decided = {}
    for unit, ratio in best.items():
        for tried in GRID:
            quants, start, _, label = next(calls)
            assert quants == {**decided, **quantize_unit(unit, tried)}
            assert start == unit
            assert label == f"{unit} cut at {tried:g} %"
        decided.update(quantize_unit(unit, ratio))
    assert next(calls, None) is None


def test_grid_in_any_order_is_tried_from_the_largest():
    fake = Fake(constant(3))
    (found,) = cut(["head"], fake, GRID[::-1])
    assert [row["cutoff"] for row in found.curve] == list(GRID)
    assert found.cutoff == 100.0


def test_limit_is_the_fewest_errors_so_far():
    errors = dict(zip(GRID, (5, 7, 3, 4, 3), strict=True))

    def landscape(quants):
        return [errors[quants["head.a"].activation_amax], 0], 1.0

    for pruned in (True, False):
        fake = Fake(landscape, pruned=pruned)
        cut(["head"], fake)
        assert [call[2] for call in fake.calls] == [None, 5, 5, 3, 3]


def test_nothing_selected():
    fake = Fake(constant(1))
    units = [UnitPlan("head")]
    found = search_percentiles(units, quantize_unit, fake, SearchConfig())
    assert found == units
    assert fake.calls == []


@pytest.mark.parametrize(
    "curve, best",
    [
        # Fewest errors.
        ([(100, 5, 1.0), (99.9, 4, 9.0), (99, 6, 0.1)], 99.9),
        # Then the smaller loss.
        ([(100, 4, 1.0), (99.9, 4, 0.9), (99, 4, 1.1)], 99.9),
        ([(100, 4, math.inf), (99.9, 5, 0.1), (99, 4, 3.0)], 99),
        # Then the larger ratio.
        ([(99, 4, 1.0), (100, 4, 1.0), (99.9, 4, 1.0)], 100),
        ([(99, 4, math.inf), (99.9, 4, math.inf)], 99.9),
    ],
)
def test_ties(curve, best):
    rows = [(ratio, Score(errors, 50, loss)) for ratio, errors, loss in curve]
    for order in (rows, rows[::-1]):
        assert best_percentile(order) == best


def test_given_up_never_wins():
    low = Score(1, 50, 0.0, complete=False)
    assert best_percentile([(100, Score(9, 50, 1.0)), (99, low)]) == 100


def test_giving_up_never_changes_the_choice():
    gave_up = 0
    for seed in range(200):
        results = []
        for pruned in (True, False):
            fake = Fake(random_landscape(seed), pruned=pruned)
            found = cut(UNITS, fake)
            results.append([row.cutoff for row in found])
            points = [point for row in found for point in row.curve]
            given_up = sum(not point["complete"] for point in points)
            assert pruned or given_up == 0
            gave_up += given_up
        assert results[0] == results[1], seed
    assert gave_up > 200  # or the comparison shows nothing


def test_curve_says_what_was_given_up():
    errors = {100.0: [2, 0], 99.9: [9, 9], 99.5: [1, 9], 99.0: [1, 0]}

    def landscape(quants):
        return errors[quants["head.a"].activation_amax], 1.0

    grid = list(errors)
    (found,) = cut(["head"], Fake(landscape, words=100), grid)
    assert found.cutoff == 99.0
    assert [(p["cutoff"], p["wer"], p["complete"]) for p in found.curve] == [
        (100.0, 2, True),
        (99.9, 9, False),
        (99.5, 10, True),  # beaten by its last batch: nothing was left out
        (99.0, 1, True),
    ]


# -- journal -------------------------------------------------------------------


def journal_of(path, key, **options):
    """A journal in the folder of a file."""
    return Journal(Store(path.parent), key, **options)


def whole_search(path, fake, fingerprint="m"):
    """A run of both steps; its decisions and how much was measured."""
    journal = journal_of(path, fingerprint)
    evaluate = journal.wrap(fake)
    baseline, found = select(evaluate, 0.5)
    search = SearchConfig(cutoffs=GRID)
    cuts = search_percentiles(found, quantize_unit, evaluate, search)
    return (baseline, found, cuts), journal


def damp(landscape):
    """Such that the float model is good and much is selected."""
    return lambda quants: landscape(quants) if quants else ([0], 1.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "search.jsonl"


def test_second_run_measures_nothing(path):
    fake = Fake(damp(random_landscape(1)))
    first, _ = whole_search(path, fake)
    assert len(fake.calls) > 10
    again = Fake(constant(0))
    second, _ = whole_search(path, again)
    assert again.calls == []
    assert second == first


def test_lines_can_be_read(path):
    fake = Fake(damp(random_landscape(1)), words=200)
    whole_search(path, fake)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(fake.calls)
    assert [row["label"] for row in rows] == [call[3] for call in fake.calls]
    for row in rows:
        assert row["wer"] == row["score"]["errors"] / 2
        assert "NaN" not in json.dumps(row)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_point(tmp_path, seed):
    landscape = damp(random_landscape(seed))
    fake = Fake(landscape)
    expected, _ = whole_search(tmp_path / "search.jsonl", fake)
    total = len(fake.calls)
    assert sum(unit.selected for unit in expected[2]) > 1
    for killed in range(0, total, 3):
        path = tmp_path / str(killed) / "search.jsonl"
        with pytest.raises(KeyboardInterrupt):
            whole_search(path, Fake(landscape, dies_after=killed))
        rest = Fake(landscape)
        found, _ = whole_search(path, rest)
        assert found == expected
        assert len(rest.calls) == total - killed
        assert rest.calls == fake.calls[killed:]


def test_truncated_last_line(path):
    landscape = damp(random_landscape(3))
    fake = Fake(landscape)
    expected, _ = whole_search(path, fake)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in (len(whole) - 1, last + 1, (last + len(whole)) // 2):
        path.write_bytes(whole[:end])
        rest = Fake(landscape)
        found, _ = whole_search(path, rest)
        assert found == expected
        assert rest.calls == fake.calls[-1:]
        assert path.read_bytes() == whole


def test_only_a_truncated_line(path):
    path.write_bytes(b'{"key": "12')
    fake = Fake(constant(1))
    whole_search(path, fake)
    assert len(fake.calls) > 0
    again = Fake(constant(1))
    whole_search(path, again)
    assert again.calls == []


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"7",
        b'"text"',
        b"null",
        b"{}",
        b'{"key": "k"}',
        b'{"key": "k", "score": null}',
        b'{"key": "k", "score": {"errors": 1, "words": 2, "loss": 1.0}}',
    ],
)
def test_damaged_line(path, damage):
    whole_search(path, Fake(constant(1)))
    lines = path.read_bytes().splitlines()
    lines[2] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    before = path.read_bytes()
    with pytest.raises(ValueError) as error:
        journal_of(path, "m")
    text = str(error.value)
    assert text.startswith(f"{path}: line 3 is damaged; ")
    assert "\n" not in text
    assert path.read_bytes() == before


def test_other_fingerprints_are_ignored_and_kept(path):
    whole_search(path, Fake(constant(1)), "one")
    kept = path.read_bytes()
    fake = Fake(constant(2))
    (baseline, _, _), journal = whole_search(path, fake, "two")
    assert baseline.errors == 2
    assert journal.reused == 0
    assert len(fake.calls) > 0
    assert path.read_bytes().startswith(kept)
    again = Fake(constant(3))
    (baseline, _, _), _ = whole_search(path, again, "one")
    assert baseline.errors == 1
    assert again.calls == []


def test_key_holds_all_that_decides():
    quant = LayerQuant(8, 8, 1.0, "max")
    keys = [
        evaluation_key("m", {"a": quant}),
        evaluation_key("n", {"a": quant}),
        evaluation_key("m", {}),
        evaluation_key("m", {"b": quant}),
        evaluation_key("m", {"a": quant, "b": quant}),
        evaluation_key("m", {"a": LayerQuant(7, 8, 1.0, "max")}),
        evaluation_key("m", {"a": LayerQuant(8, 7, 1.0, "max")}),
        evaluation_key("m", {"a": LayerQuant(8, 8, 1.0 + 2**-50, "max")}),
        evaluation_key("m", {"a": LayerQuant(8, 8, 1.0, "mse")}),
        evaluation_key("m", {"a": quant}, give_up_above=3),
        evaluation_key("m", {"a": quant}, give_up_above=0),
    ]
    assert len(set(keys)) == len(keys)


def test_key_does_not_depend_on_the_order():
    a, b = LayerQuant(8, 8, 1.0), LayerQuant(8, 8, 2.0)
    one = evaluation_key("m", {"a": a, "b": b})
    assert one == evaluation_key("m", {"b": b, "a": a})


@pytest.mark.parametrize("loss", [1.5, math.inf, 0.1 + 0.2])
@pytest.mark.parametrize("complete", [True, False])
def test_scores_come_back_exactly(path, loss, complete):
    score = Score(3, 7, loss, complete)
    journal_of(path, "m").wrap(lambda *_: score)({})
    assert journal_of(path, "m").wrap(None)({}) == score
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_broken_loss_decides_the_same_after_a_restart(path):
    """A recipe whose loss is NaN for some ratio: ties of the errors are
    decided by it, now and when the journal is read."""

    def landscape(quants):
        ratio = quants["head.a"].activation_amax if quants else 100.0
        return [3], math.nan if ratio == 100.0 else 1.0

    choices = []
    for _ in range(2):
        evaluate = journal_of(path, "m").wrap(Fake(landscape))
        (found,) = cut(["head"], evaluate)
        choices.append(found.cutoff)
    assert choices[0] == choices[1]


# -- by intervals --------------------------------------------------------------


def paired(errors, losses=(1.0,) * 4, words=25):
    """A score with counts by utterance, each of as many words."""
    return Score(
        sum(errors),
        words * len(errors),
        sum(losses) / len(losses),
        True,
        tuple(errors),
        (words,) * len(errors),
        tuple(losses),
    )


def by_unit(scores, baseline):
    """Evaluates each unit alone."""

    def evaluate(quants, start=None, give_up_above=None, label=""):
        assert give_up_above is None
        return scores[start] if quants else baseline

    return evaluate


def test_interval_decides_where_it_is_on_one_side():
    baseline = paired([5] * 40)
    scores = {
        "conv.0": paired([6] * 40),  # each utterance is worse
        "conv.1": paired([5] * 40),
        # One utterance has all the errors: the interval reaches below the
        # threshold, and the loss does not rise.
        "block.0": paired([5] * 39 + [10]),
        "head": paired([4] * 40),
    }
    evaluate = by_unit(scores, baseline)
    _, found = select(evaluate, rule="interval")
    assert [row.selected for row in found] == [True, False, False, False]
    assert found[0].delta_wer_ci == [4.0, 4.0]
    low, high = found[2].delta_wer_ci
    assert low == 0 < 0.25 < high
    # As published it would have been selected, by chance.
    _, found = select(evaluate)
    assert [row.selected for row in found] == [True, False, True, False]
    assert found[2].delta_wer_ci == [low, high]


def test_loss_decides_what_the_words_leave_open():
    baseline = paired([5] * 40, [1.0] * 40)
    undecided = [5] * 39 + [10]
    scores = {
        "conv.0": paired(undecided, [1.0] * 40),
        # 4 % of 20 points.
        "conv.1": paired(undecided, [1.04] * 40),
        # 1 % of 20 points.
        "block.0": paired(undecided, [1.01] * 40),
        # 4 %, by one utterance: the interval reaches zero.
        "head": paired(undecided, [1.0] * 39 + [2.6]),
    }
    evaluate = by_unit(scores, baseline)
    _, found = select(evaluate, rule="interval")
    assert [row.selected for row in found] == [False, True, False, False]


def test_interval_needs_counts_by_utterance():
    fake = Fake(rising({"head": 3}))
    with pytest.raises(ValueError, match=r"selection: threshold$"):
        select(fake, rule="interval")
    _, found = select(fake)
    assert found[0].delta_wer_ci is None


@pytest.mark.parametrize(
    "curve, surest",
    [
        # Fewer errors in each utterance.
        ([(100, [5] * 40, 1.0), (99, [4] * 40, 2.0)], 99),
        # Fewer errors, by one utterance: within the noise; same loss.
        ([(100, [5] * 40, 1.0), (99, [5] * 39 + [0], 1.0)], 100),
        # The same, and the loss decides.
        ([(100, [5] * 40, 1.0), (99, [5] * 39 + [0], 0.9)], 99),
        ([(100, [5] * 39 + [0], 1.0), (99, [5] * 40, 0.9)], 99),
        # Each step against the best so far, not the last.
        (
            [(100, [5] * 40, 0.8), (99, [5] * 40, 0.9), (98, [5] * 40, 0.85)],
            100,
        ),
        # Never a smaller loss against more errors in each utterance.
        ([(100, [5] * 40, 1.0), (99, [6] * 40, 0.1)], 100),
    ],
)
def test_surest_percentile(curve, surest):
    rows = [(r, paired(errors, [loss] * 40)) for r, errors, loss in curve]
    for order in (rows, rows[::-1]):
        assert surest_percentile(order, 0.8) == surest


def test_cutoffs_by_interval_give_up_nothing():
    scores = {r: paired([5] * 40, [r / 100] * 40) for r in GRID}
    limits = []

    def evaluate(quants, start=None, give_up_above=None, label=""):
        limits.append(give_up_above)
        return scores[quants["head.a"].activation_amax]

    (found,) = cut(["head"], evaluate, rule="interval")
    assert found.cutoff == min(GRID)
    assert limits == [None] * len(GRID)


def test_counts_by_utterance_come_back(path):
    score = paired([1, 2, 0, 3], [0.1 + 0.2, 1e-9, 2.0, 3.0])
    journal_of(path, "m").wrap(lambda *_: score)({})
    assert journal_of(path, "m", by_utterance=True).wrap(None)({}) == score


def test_a_loss_that_is_not_finite_leaves_none_by_batch(path):
    score = paired([1, 2, 0, 3], [1.0, math.nan, 2.0, 3.0])
    assert score.batch_losses == ()
    journal_of(path, "m").wrap(lambda *_: score)({})
    assert journal_of(path, "m").wrap(None)({}) == score


def test_lines_of_earlier_versions(path):
    """They have no counts by utterance: read where these are not needed."""
    old = Score(2, 100, 1.0)
    journal_of(path, "m").wrap(lambda *_: old)({}, label="float")
    assert "utterance" not in path.read_text()
    assert journal_of(path, "m").wrap(None)({}) == old
    new = paired([1, 1, 0, 0])
    journal = journal_of(path, "m", by_utterance=True)
    assert journal.wrap(lambda *_: new)({}) == new
    assert journal.reused == 0
    assert journal_of(path, "m", by_utterance=True).wrap(None)({}) == new
    # What was given up has none either, and needs none.
    given_up = Score(9, 50, 1.0, complete=False)
    journal_of(path, "n").wrap(lambda *_: given_up)({}, give_up_above=8)
    again = journal_of(path, "n", by_utterance=True).wrap(None)
    assert again({}, give_up_above=8) == given_up


# -- by divergence -------------------------------------------------------------


def ranked(losses, errors, rule="threshold"):
    """Step 2 of one unit; losses and errors by percentile."""

    def of(quants):
        return quants["u.a"].activation_amax

    rank = Fake(lambda quants: ([0], losses[of(quants)]))
    words = Fake(lambda quants: ([errors[of(quants)]], 1.0))
    search = SearchConfig(cutoffs=list(losses), selection=rule)
    plans = [UnitPlan("u", selected=True)]
    (plan,) = search_percentiles(plans, quantize_unit, words, search, rank)
    return plan, [call[0]["u.a"].activation_amax for call in words.calls]


def test_words_confirm_the_least_divergence():
    losses = {100.0: 3.0, 99.9: 1.0, 99.0: 2.0}
    plan, decoded = ranked(losses, {100.0: 5, 99.9: 5})
    assert plan.cutoff == 99.9
    # Of three candidates two are decoded: the best one and the largest.
    assert sorted(decoded) == [99.9, 100.0]
    rows = [(r["cutoff"], r["wer"], r["secondary"]) for r in plan.curve]
    assert rows == [(100.0, 1.25, 3.0), (99.9, 1.25, 1.0), (99.0, None, 2.0)]


def test_words_contradict_the_least_divergence():
    plan, _ = ranked({100.0: 3.0, 99.9: 1.0}, {100.0: 5, 99.9: 6})
    assert plan.cutoff == 100.0


def test_nothing_is_decoded_where_clipping_does_not_help():
    plan, decoded = ranked({100.0: 1.0, 99.9: 1.0}, {})
    assert (plan.cutoff, decoded) == (100.0, [])
