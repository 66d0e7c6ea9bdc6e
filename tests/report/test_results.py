"""What a run measured, the report built from it, and the comparison."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from speechbrain_stablequant.core.error_rates import (
    Transcript,
    paired_delta,
    score,
)
from speechbrain_stablequant.core.histogram import Histogram
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import (
    LayerPlan,
    QuantizationPlan,
    UnitPlan,
)
from speechbrain_stablequant.report import searched, tables
from speechbrain_stablequant.report.build import (
    build_report,
    float_size,
    write_report,
)
from speechbrain_stablequant.report.comparison import (
    comparison_markdown,
    variant_rows,
    write_comparison,
)
from speechbrain_stablequant.report.results import (
    Effort,
    Evaluation,
    Execution,
    SetResult,
    Turns,
    real_time_factors,
    speedup,
)
from speechbrain_stablequant.report.tables import interval
from speechbrain_stablequant.utils.files import read_json
from speechbrain_stablequant.utils.store import Store


def plan_of(quants, fingerprint="weights", **fields):
    """A plan that quantizes some layers."""
    layers = [
        LayerPlan(name, "head", "linear", quant, 1.0, 100.0, "")
        for name, quant in quants.items()
    ]
    units = [UnitPlan("head")]
    values = {"method": "max", "weight_bits": 8, "activation_bits": 8}
    values.update(fields)
    return QuantizationPlan(
        **values,
        fingerprint=fingerprint,
        settings={},
        search={},
        units=units,
        layers=layers,
    )


def bits(weight_bits):
    return LayerQuant(weight_bits, 8, 1.0)


# -- sizes, by hand ------------------------------------------------------------


def test_size_of_a_linear():
    assert float_size({"enc": nn.Linear(3, 2)}) == 4 * (6 + 2)
    assert float_size({"enc": nn.Linear(3, 2, bias=False)}) == 4 * 6


def test_size_of_half_precision_is_that_of_float32():
    assert float_size({"enc": nn.Linear(3, 2).half()}) == 4 * (6 + 2)


def test_a_module_behind_two_keys_counts_once():
    shared = nn.Linear(3, 2)
    modules = {"a": shared, "b": nn.Sequential(shared)}
    assert float_size(modules) == 4 * (6 + 2)


def test_size_of_a_whole_model(tiny_modules):
    count = sum(p.numel() for p in tiny_modules.parameters())
    assert float_size(dict(tiny_modules)) == 4 * count


# -- both evaluations of a set -------------------------------------------------

FLOAT = [
    Transcript("u1", "ONE TWO THREE FOUR", "ONE TWO THREE FOUR"),
    Transcript("u2", "FIVE SIX", "FIVE SIX SEVEN"),
    Transcript("u3", "EIGHT", ""),
]
QUANTIZED = [
    Transcript("u1", "ONE TWO THREE FOUR", "ONE TOO THREE"),
    Transcript("u2", "FIVE SIX", "FIVE SIX"),
    Transcript("u3", "EIGHT", "AIT"),
]


def evaluation(transcripts, seconds=2.0):
    """One whose turns took as long in float, and seconds each when quantized,
    for ten of audio."""
    turns = Turns([2.0] * 4, [seconds] * 4, [10.0] * 4)
    return Evaluation(transcripts, turns=turns)


def test_pair_brings_into_order():
    result = SetResult.pair(
        evaluation(FLOAT), evaluation(QUANTIZED[::-1], seconds=1.5)
    )
    assert result.baseline == evaluation(FLOAT)
    assert result.quantized == evaluation(QUANTIZED, seconds=1.5)


def test_the_speed_is_that_of_turns():
    turns = Turns([2.0, 4.0, 6.0], [1.0, 1.0, 2.0], [10.0, 10.0, 20.0])
    result = SetResult.pair(
        evaluation(FLOAT), Evaluation(QUANTIZED, turns=turns)
    )
    assert real_time_factors([result]) == {"float": 0.3, "quantized": 0.1}
    found = speedup([result])
    assert (found["batches"], found["ratio"]) == (3, pytest.approx(3))
    # Between those of the batches that gained least and most.
    assert found["ratio_ci"] == pytest.approx([2, 4])
    both = speedup([result, result])
    assert (both["batches"], both["ratio"]) == (6, pytest.approx(3))


def test_too_few_turns_have_no_interval():
    turns = Turns([2.0, 4.0], [1.0, 1.0], [10.0, 10.0])
    few = SetResult.pair(evaluation(FLOAT), Evaluation(QUANTIZED, turns=turns))
    assert speedup([few]) is None
    assert real_time_factors([few])["float"] == pytest.approx(0.3)
    none = SetResult.pair(evaluation(FLOAT), Evaluation(QUANTIZED))
    assert speedup([none]) is None
    assert real_time_factors([none]) == {"float": None, "quantized": None}


@pytest.mark.parametrize(
    "transcripts, named",
    [
        (QUANTIZED[:2], "u3"),
        (QUANTIZED[1:], "u1"),
        ([], "u1, u2, u3"),
        ([*QUANTIZED, Transcript("u4", "NINE", "NINE")], "more ran"),
        ([*QUANTIZED[:2], Transcript("u4", "NINE", "NINE")], "u3"),
    ],
)
def test_pair_refuses_other_utterances(transcripts, named):
    with pytest.raises(ValueError) as error:
        SetResult.pair(evaluation(FLOAT), evaluation(transcripts))
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("test set: the float and the quantized evaluation")
    assert f"({named})" in text


def test_result_in_the_report():
    result = SetResult.pair(evaluation(FLOAT), evaluation(QUANTIZED))
    raw = result.to_dict()
    assert raw["float"] == score(FLOAT).to_dict()
    assert raw["quantized"] == score(QUANTIZED).to_dict()
    # 7 reference words; one insertion and one deletion against two
    # substitutions and one deletion.
    assert raw["delta_wer"] == pytest.approx(100 / 7)
    words = paired_delta(FLOAT, QUANTIZED)
    chars = paired_delta(FLOAT, QUANTIZED, unit="char")
    assert raw["delta_wer_ci"] == [words.low, words.high]
    assert raw["delta_cer"] == chars.delta
    assert raw["delta_cer_ci"] == [chars.low, chars.high]


# -- kept for a run that is started again --------------------------------------

PLAN = plan_of({"enc": bits(8)})


def place(path):
    """Store and name of a file."""
    return Store(path.parent), path.name


def test_write_and_read(tmp_path):
    path = tmp_path / "transcripts.json"
    key = evaluation(FLOAT).key(PLAN)
    kept = evaluation(QUANTIZED, seconds=1 / 3)
    kept.write(*place(path), key)
    assert Evaluation.read(*place(path), key) == kept


GREEDY = [replace(t, hypothesis="SIX") for t in FLOAT]


def test_the_folders_transcripts_are_kept(tmp_path):
    where = place(tmp_path / "transcripts.json")
    kept = replace(evaluation(QUANTIZED), folder=tuple(GREEDY))
    kept.write(*where, "key")
    assert Evaluation.read(*where, "key") == kept


def test_the_folders_rates_where_it_decodes_otherwise():
    one = replace(evaluation(FLOAT), folder=tuple(GREEDY))
    two = replace(evaluation(QUANTIZED[::-1]), folder=tuple(GREEDY[::-1]))
    found = SetResult.pair(one, two).to_dict()["folder"]
    expected = score(GREEDY).to_dict()
    assert found == {"float": expected, "quantized": expected}
    # Where only one of both differs, the other is the recipe's.
    found = SetResult.pair(one, evaluation(QUANTIZED)).to_dict()["folder"]
    assert found["float"] == expected
    assert found["quantized"] == score(QUANTIZED).to_dict()
    plain = SetResult.pair(evaluation(FLOAT), evaluation(QUANTIZED))
    assert "folder" not in plain.to_dict()


def test_read_by_another_key(tmp_path):
    path = tmp_path / "transcripts.json"
    evaluation(QUANTIZED).write(*place(path), "one")
    before = path.read_bytes()
    assert Evaluation.read(*place(path), "two") is None
    assert path.read_bytes() == before


def test_read_what_is_not_there(tmp_path):
    assert Evaluation.read(*place(tmp_path / "nothing.json"), "key") is None


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"seconds": 1}'])
def test_read_something_else(tmp_path, content):
    path = tmp_path / "transcripts.json"
    path.write_text(content)
    assert Evaluation.read(*place(path), "key") is None


def test_read_a_damaged_file(tmp_path):
    path = tmp_path / "transcripts.json"
    path.write_text('{"key": "k"')
    with pytest.raises(ValueError, match=r"transcripts\.json"):
        Evaluation.read(*place(path), "k")


def test_key_is_about_the_plan_and_the_utterances():
    base = evaluation(FLOAT)
    others = [
        base.key(plan_of({})),
        base.key(plan_of({"enc": bits(7)})),
        base.key(plan_of({"enc": LayerQuant(8, 8, 1.0, "mse")})),
        base.key(plan_of({"enc": LayerQuant(8, 8, 1.5)})),
        base.key(plan_of({"lin": bits(8)})),
        base.key(plan_of({"enc": bits(8)}, fingerprint="other")),
        base.key(PLAN, "openvino"),
        base.key(PLAN, "openvino", "float32"),
        evaluation(FLOAT[:2]).key(PLAN),
        evaluation([*FLOAT[:2], Transcript("u9", "EIGHT", "")]).key(PLAN),
        evaluation([*FLOAT[:2], Transcript("u3", "NINE", "")]).key(PLAN),
        # What the float model hears now shows what else has changed.
        evaluation(QUANTIZED).key(PLAN),
        replace(base, audio="others").key(PLAN),
    ]
    assert len({base.key(PLAN), *others}) == 1 + len(others)


def test_key_is_not_about_times():
    key = evaluation(FLOAT).key(PLAN)
    assert evaluation(FLOAT, seconds=9.0).key(PLAN) == key
    assert evaluation(FLOAT).key(copy.deepcopy(PLAN)) == key


# -- the built report ----------------------------------------------------------


def test_built_report(tmp_path):
    plan = QuantizationPlan(
        method="stablequant",
        weight_bits=8,
        activation_bits=6,
        fingerprint="weights",
        settings={},
        search={"num_utterances": 12, "baseline_wer": 2.0},
        units=[UnitPlan("head")],
        layers=[
            LayerPlan("enc", "head", "linear", bits(8), 2.0, 99.9, "", 0.02),
            LayerPlan("lin", "head", "linear", None, 2.0, 100.0, ""),
        ],
    )
    histogram = Histogram()
    histogram.add(torch.arange(1000) / 1000)
    result = SetResult.pair(evaluation(FLOAT), evaluation(QUANTIZED))
    given = (
        plan,
        {"clean": result},
        {"enc": nn.Linear(3, 2), "lin": nn.Linear(2, 2), "other": nn.ReLU()},
        {"enc": histogram, "lin": histogram},
        {"python": "3.11"},
        Execution("torch", "float16", 5_000_000, ["enc", "lin"], True),
        ["said"],
    )
    report = build_report(*given)
    assert "utterances" not in build_report(*given, utterances=False)
    assert (report["settings"], "calibration" in report) == (plan.settings, 0)
    used = build_report(*given, effort=Effort(1.0, {"calibration": 80}))
    assert used["calibration"]["num_utterances"] == 80
    assert tables.calibration(used) == (
        "Calibration: 80 utterances of the validation set."
    )
    named = build_report(
        *given, effort=Effort(1.0, {"calibration": 80}), drawn_from="manifest"
    )
    assert tables.calibration(named) == (
        "Calibration: 80 utterances of the manifest."
    )
    assert (report["format"], report["title"]) == (1, "W8A6 stablequant")
    modules = {"enc": "Linear", "lin": "Linear"}
    assert report["model"] == {"modules": modules, "parameters": 8 + 6}
    # The model is called by its largest module, not by its first.
    turned = {"lin": nn.Bilinear(1, 1, 1), "enc": nn.Linear(3, 2)}
    ordered = build_report(*given[:2], turned, *given[3:])
    assert [*ordered["model"]["modules"]] == ["enc", "lin"]
    assert tables.title(ordered) == "Linear: W8A6 stablequant"
    written = write_report(report, tmp_path)
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "enc (Linear), lin (Linear), 0.0 million parameters" in text
    assert report["backend"] == "simulated"
    assert report["test"] == {"clean": result.to_dict()}
    assert report["size_mb"] == {
        "float": 4 * (8 + 6) / 1e6,
        "quantized": 5.0,
        "quantized_floats": "float16",
    }
    assert report["rtf"] == {"float": 0.2, "quantized": 0.2}
    (unit,) = report["units"]
    assert (unit["name"], unit["layers"], unit["parameters"]) == ("head", 2, 10)
    # A layer that stays float has no histogram in the report.
    (entry,) = report["histograms"].values()
    assert (entry["unit"], sum(entry["counts"])) == ("head", 1000)
    assert (entry["amax"], entry["beyond"]) == (1.0, 0.02)
    assert '<td data-name="Cut">2 %</td>' in text
    said = searched.cut(report)
    assert said.startswith("The ranges of 1 of 1 layers end below the largest")
    assert "and cut up to 2 % of a layer's inputs" in said
    report["layers"][0]["beyond"] = 0.0
    assert searched.cut(report) == "No range cuts a value of the calibration."
    assert searched.cut({}) == ""
    report["layers"][0]["beyond"] = 0.02
    assert entry["cutoff_amax"] < entry["max"] <= entry["range"]
    assert report["search"] == plan.search
    assert report["warnings"] == ["said"]
    assert next(iter(report["files"])) == "plan"
    # All of it can be written, and is complete.
    assert read_json(written[0], "report") == report
    assert [row["bits"] for row in report["layers"]] == ["W8A8", "float"]
    assert [row["bytes"] for row in report["layers"]] == [6, 16]
    (row,) = report["utterances"]["clean"]
    assert (row["id"], row["errors"]) == ("u1", [0, 2])


# -- variants side by side -----------------------------------------------------

W8, W6 = ("max", 8, 8), ("mse", 6, 5)
CPU = Execution("openvino", "float16", 8_000_000)
RESULT = SetResult.pair(evaluation(FLOAT), evaluation(QUANTIZED, seconds=1.5))


def table_of(*rows):
    return {"rows": [row for part in rows for row in part], "float_mb": 32.0}


def test_comparison():
    same = SetResult.pair(evaluation(FLOAT), evaluation(FLOAT))
    simulated = Execution("torch", "float16", 6_040_000, simulated=True)
    table = table_of(
        variant_rows("w8", W8, {"clean": same, "other": RESULT}, CPU),
        variant_rows("w6", W6, {"clean": RESULT}, simulated),
    )
    rows = table["rows"]
    assert [(row["variant"], row["set"]) for row in rows] == [
        ("w8", "clean"),
        ("w8", "other"),
        ("w6", "clean"),
    ]
    assert rows[0]["delta_wer"] == 0
    assert rows[2]["delta_wer"] == pytest.approx(100 / 7)
    assert (rows[2]["method"], rows[2]["weight_bits"]) == ("mse", 6)
    assert rows[2]["activation_bits"] == 5
    lines = comparison_markdown(table).splitlines()
    assert [line.split("|")[1:4] for line in lines[2:]] == [
        [" clean ", " float ", " 28.57 "],
        [" clean ", " w8 ", " 28.57 "],
        [" other ", " float ", " 28.57 "],
        [" other ", " w8 ", " 42.86 "],
        [" clean ", " w6 ", " 42.86 "],
    ]
    assert [line.split("|")[4:6] for line in (lines[3], lines[5])] == [
        [" 0.00 ", " 0.00 to 0.00 "],
        [" +14.29 ", f" {interval(RESULT.to_dict()['delta_wer_ci'])} "],
    ]
    # The gain over float, in turns; a simulation's speed is none.
    assert [line.split("|")[8:10] for line in lines] == [
        [" MB ", " speed "],
        [" ---: ", " --- "],
        [" 32.0 ", " "],
        [" 8.0 ", " no difference shown (1.00x to 1.00x) "],
        [" 32.0 ", " "],
        [" 8.0 ", " 1.33x faster (1.33x to 1.33x) "],
        [" 6.0 ", " "],
    ]
    assert all(line.count("|") == 10 for line in lines)


def test_written_comparison(tmp_path, capsys):
    table = table_of(variant_rows("w8", W8, {"clean": RESULT}, CPU))
    write_comparison(table, tmp_path)
    assert read_json(tmp_path / "comparison.json", "comparison") == table
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert text == comparison_markdown(table)
    assert text in capsys.readouterr().out
    image = (tmp_path / "comparison_clean.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    write_comparison(table, tmp_path)
    assert image == (tmp_path / "comparison_clean.png").read_bytes()


def test_comparison_with_efforts(tmp_path):
    path = tmp_path / "effort.json"
    first = Effort(61.4, {"calibration": 40, "train": 9}, ["train"])
    assert first.remembered(*place(path), "plan") == first
    # The same plan again was read from what is on disk.
    again = replace(first, seconds=0.2)
    assert again.remembered(*place(path), "plan") == first
    assert again.remembered(*place(path), "another plan") == again
    table = table_of(
        variant_rows("qat", W8, {"clean": RESULT}, CPU, first),
        variant_rows("plan", W8, {"clean": RESULT}, CPU),
    )
    assert table["rows"][0]["effort"]["seconds"] == 61.4
    assert "effort" not in table["rows"][1]
    lines = comparison_markdown(table).splitlines()
    assert [line.split("|")[-3:-1] for line in lines] == [
        [" made in ", " utterances used "],
        [" ---: ", " --- "],
        [" ", " "],
        [" 61 s ", " calibration 40, train 9 with transcripts "],
        [" ", " "],
    ]


def test_comparison_with_counted_products():
    count = {"integer": 30, "float": 4}
    table = table_of(
        variant_rows("nncf", W8, {"clean": RESULT}, CPU, operations=count),
        variant_rows("w8", W8, {"clean": RESULT}, CPU),
    )
    assert table["rows"][0]["operations"] == count
    assert "operations" not in table["rows"][1]
    lines = comparison_markdown(table).splitlines()
    assert [line.split("|")[-2] for line in lines] == [
        " float products ",
        " ---: ",
        " ",
        " 4 of 34 ",
        " ",
    ]
    assert len({line.count("|") for line in lines}) == 1
