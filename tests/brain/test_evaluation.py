"""An evaluation, from what a metric and a clock have collected."""

from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from speechbrain.utils.metric_stats import ErrorRateStats, MetricStats

from speechbrain_stablequant.brain import evaluation as module
from speechbrain_stablequant.brain.evaluation import environment, evaluation_of
from speechbrain_stablequant.brain.metrics import (
    counts_of,
    error_metrics,
    join_metric,
    join_rows,
    metric_name,
    metric_of,
    rate_name,
    rate_of,
)
from speechbrain_stablequant.brain.passes import first_tensor


def collected(*texts):
    """A metric of two utterances, and what the folder has heard of them."""
    metric = ErrorRateStats()
    metric.append(
        ["u1", "u2"], [["ONE", "TWO"], ["SIX"]], [["ONE"], ["FIVE", "SIX"]]
    )
    clock = SimpleNamespace(audio_digest="a")
    return evaluation_of(metric, clock, [tuple(text) for text in texts])


def test_what_the_folder_has_heard():
    found = collected("ONE TWO", "SX")
    assert [t.id for t in found.folder] == ["u1", "u2"]
    assert [t.hypothesis for t in found.folder] == ["ONE TWO", "SX"]
    assert [t.reference for t in found.folder] == ["ONE", "FIVE SIX"]
    # The same, or not of all utterances: nothing beside the recipe's.
    assert collected("ONE TWO ", "SIX").folder == ()
    assert collected("ONE").folder == ()
    assert collected().folder == ()


# -- metrics -------------------------------------------------------------------


def test_one_process_has_all_rows():
    assert join_rows(["a", "b", "c"], [2, 1]) == ["a", "b", "c"]


def test_join_drops_what_was_scored_before():
    metric = ErrorRateStats()
    metric.append(["u0"], [["A"]], [["B"]])
    metric.append(["u1", "u2"], [["A"], ["B"]], [["A"], ["C"]])
    join_metric(metric, [1, 1])
    assert metric.ids == ["u1", "u2"]
    assert [row["key"] for row in metric.scores] == ["u1", "u2"]


def test_a_wrong_metric_attribute_names_the_others():
    brain = sb.Brain()
    brain.cer, brain.steps = ErrorRateStats(), 3
    assert metric_of(brain, "cer") is brain.cer
    for name in ("word", "steps"):
        with pytest.raises(ValueError, match=f"'{name}'; it has cer"):
            metric_of(brain, name)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("wer_metric", "WER"),
        ("per_metrics", "PER"),
        ("hparams.cer_stats", "CER"),
        ("metrics.ter", "TER"),
        ("coer_metric", "COER"),
        ("err_rate_metrics", "WER"),
        ("tracker", "WER"),
    ],
)
def test_what_a_metric_counts(name, rate):
    assert rate_name(name, ErrorRateStats()) == rate
    assert rate_name(name, ErrorRateStats(split_tokens=True)) == "CER"


def test_metrics_are_found_wherever_a_brain_keeps_them():
    brain = sb.Brain(hparams={"ter_stats": ErrorRateStats(), "rate": 3})
    brain.seq_metrics = MetricStats(lambda x: x)
    brain.stats = {"cer": ErrorRateStats(split_tokens=True), "loss": 1.0}
    brain.rows = [ErrorRateStats()]
    brain.per_metrics = ErrorRateStats()
    found = ["rows.0", "per_metrics", "stats.cer", "hparams.ter_stats"]
    assert list(error_metrics(brain)) == found
    assert metric_name(brain, "stats.cer") == "stats.cer"
    assert rate_of(brain, "stats.cer") == "CER"
    del brain.rows
    assert metric_name(brain, "wer_metric") == "per_metrics"
    assert rate_of(brain, "wer_metric") == "PER"
    brain.wer_metric = ErrorRateStats()
    assert metric_of(brain, "wer_metric") is brain.wer_metric


def test_nothing_but_losses_is_refused():
    brain = sb.Brain()
    brain.error_metrics = MetricStats(lambda x: x)
    with pytest.raises(ValueError, match=r"error_metrics \(MetricStats\)"):
        metric_of(brain, "wer_metric")


def test_counts_of_all_metrics():
    def brain(heard):
        made = sb.Brain()
        made.wer_metric = ErrorRateStats()
        made.cer_metric = ErrorRateStats(split_tokens=True)
        for metric in (made.wer_metric, made.cer_metric):
            metric.append(["u1", "u2"], heard, [["AB"], ["CD", "EF"]])
        return counts_of(made)

    before = brain([["AB"], ["CD", "EF"]])
    after = brain([["AX"], ["CD"]])
    assert before["wer_metric"].tokens == (1, 2)
    assert before["cer_metric"].tokens == (2, 5)
    row = before["cer_metric"].compared(after["cer_metric"])
    assert (row["rate"], row["float"]) == ("CER", 0)
    assert row["quantized"] == row["delta"] == pytest.approx(400 / 7)
    low, high = row["delta_ci"]
    assert low <= row["delta"] <= high


def test_first_tensor():
    one = torch.ones(1)
    assert first_tensor((None, {"a": [one, torch.zeros(1)]})) is one
    assert first_tensor((None, {})) is None


# -- what it was measured with -------------------------------------------------


def test_environment_says_what_float_was(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    plain = environment("cpu")
    assert plain["float arithmetic"] == "float32"
    assert not {"TF32", "CUDA"} & set(plain)
    monkeypatch.setattr(module, "allows_tf32", lambda: (True, False))
    found = environment("cuda:0", "fp16")
    assert found["device"] == "a card"
    assert found["float arithmetic"] == "autocast to float16"
    assert (found["TF32"], found["CUDA"]) == ("products", "13.0")
    monkeypatch.setattr(module, "allows_tf32", lambda: (False, False))
    assert environment("cuda", "fp32")["TF32"] == "off"
