"""A recipe script that knows nothing of quantization, and a YAML block."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from starter import environment
from trained_recipe import ATTACHED, BLOCK, RECIPE, contents, probe_size

SETS = ("clean", "noisy")
RATES = {"WER", "CER", "utterances"}


def read(path: Path) -> dict:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def check_report(folder: Path, sets=SETS) -> dict:
    """Asserts that a report is whole, and gives it."""
    report = read(folder / "report.json")
    assert list(report["test"]) == list(sets)
    for row in report["test"].values():
        assert row["float"].keys() >= RATES
        assert row["quantized"].keys() >= RATES
        low, high = row["delta_wer_ci"]
        difference = row["quantized"]["WER"] - row["float"]["WER"]
        assert row["delta_wer"] == pytest.approx(difference)
        assert low <= row["delta_wer"] <= high
    # The probe has one size, and this model is smaller than it.
    model = report["size_mb"]["quantized"] - probe_size(folder) / 1e6
    assert 0 < model < report["size_mb"]["float"]
    assert report["rtf"].keys() == {"float", "quantized"}
    assert min(report["rtf"].values()) > 0
    for unit in report["units"]:
        assert unit.keys() >= {"name", "delta_wer", "selected", "cutoff"}
    for name in ("report.md", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert list(folder.glob("*.png"))
    return report


def quantized_errors(folder: Path) -> dict[str, str]:
    """The quantized model's error files by set."""
    return {
        name: (folder / f"wer_{name}.txt").read_text(encoding="utf-8")
        for name in SETS
    }


@pytest.fixture(scope="module")
def evaluated(trained):
    """The trained checkpoint evaluated with a block, by ``python``."""
    before = contents(trained.save)
    output = trained.root / "evaluated"
    finished = subprocess.run(
        [
            sys.executable,
            RECIPE / "train.py",
            *trained.test_arguments(output, block=BLOCK),
        ],
        cwd=trained.root,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return output, finished, before


def test_script_has_no_mention():
    for name in ("train.py", "hparams.yaml", "material.py"):
        text = (RECIPE / name).read_text(encoding="utf-8").lower()
        assert "quant" not in text, name


def test_training_without_block(trained):
    assert not list(trained.root.glob("trained/**/*quant*"))
    (checkpoint,) = trained.save.glob("CKPT*")
    meta = (checkpoint / "CKPT.yaml").read_text(encoding="utf-8")
    (rate,) = (x for x in meta.splitlines() if x.startswith("WER:"))
    # A system that recognizes, or the other tests would compare nothing.
    assert float(rate.partition(":")[2]) < 50


def test_report_is_whole(evaluated):
    output, finished, _ = evaluated
    folder = output / "quantized"
    report = check_report(folder)
    names = [unit["name"] for unit in report["units"]]
    blocks = ["block.0", "block.1"]
    convs = [f"conv.{index}" for index in range(4)]
    assert names == [*convs, "projection", "pos_conv", *blocks, "head"]
    assert str(folder / "report.html") in finished.stdout
    assert report["test"]["clean"]["float"]["utterances"] == 4
    assert report["test"]["noisy"]["float"]["utterances"] == 3


def test_few_bits_do_harm(evaluated):
    output, _, _ = evaluated
    report = read(output / "quantized/report.json")
    assert any(row["delta_wer"] > 0 for row in report["test"].values())
    assert any(unit["selected"] for unit in report["units"])


def test_plan_and_journal(evaluated):
    output, _, _ = evaluated
    plan = read(output / "quantized/plan.json")
    assert (plan["weight_bits"], plan["activation_bits"]) == (3, 2)
    assert {layer["unit"] for layer in plan["layers"]} == {
        unit["name"] for unit in plan["units"]
    }
    assert all(layer["quant"] for layer in plan["layers"])
    # from it, the triton runtime chooses the dtype of the residual stream
    assert 0 < plan["residual_amax"] < 2**14
    text = (output / "quantized/search.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({row["key"] for row in rows}) == len(rows)
    assert rows[0]["label"] == "float"
    assert rows[0]["wer"] == pytest.approx(
        plan["search"]["baseline_wer"], abs=1e-4
    )
    selected = [unit for unit in plan["units"] if unit["selected"]]
    tried = 1 + len(plan["units"]) + 3 * len(selected) + 1
    assert plan["search"]["evaluations"] == tried


def test_float_errors_are_those_without_block(trained, evaluated):
    output, _, _ = evaluated
    for name in SETS:
        file = f"wer_{name}.txt"
        assert (output / file).read_bytes() == (
            trained.output / file
        ).read_bytes()
    report = read(output / "quantized/report.json")
    text = (trained.output / "wer_noisy.txt").read_text(encoding="utf-8")
    rate = float(text.split()[1])
    assert round(report["test"]["noisy"]["float"]["WER"], 2) == rate


def test_quantized_errors_are_those_of_the_report(evaluated):
    output, _, _ = evaluated
    report = read(output / "quantized/report.json")
    for name, text in quantized_errors(output / "quantized").items():
        rate = float(text.split()[1])
        assert round(report["test"][name]["quantized"]["WER"], 2) == rate


def logged(output: Path) -> tuple[list[str], list[str]]:
    """Lines of the recipe's train_logger: its own, and ours."""
    text = (output / "train_log.txt").read_text(encoding="utf-8")
    rows: tuple[list[str], list[str]] = ([], [])
    for line in text.splitlines():
        rows[line.startswith("quantize ")].append(line)
    return rows


def test_nothing_saved_or_annealed(trained, evaluated):
    output, _, before = evaluated
    assert contents(trained.save) == before
    assert not list(output.rglob("CKPT*"))
    # One for each set: what the recipe itself wrote.
    assert logged(output)[0] == logged(trained.output)[0][-len(SETS) :]


def test_search_and_results_are_logged(evaluated):
    output, _, _ = evaluated
    *search, clean, noisy = logged(output)[1]
    assert search[0].startswith("quantize evaluation: 1 - valid search WER: ")
    report = read(output / "quantized/report.json")
    for name, line in (("clean", clean), ("noisy", noisy)):
        found = dict(re.findall(r"test (.+?): ([-+.e\d]+)", line))
        for model in ("float", "quantized"):
            rate = report["test"][name][model]["WER"]
            got = float(found[f"{name} {model} WER"])
            assert got == pytest.approx(rate, rel=0.01)


def test_null_switches_off(trained, tmp_path):
    output = tmp_path / "off"
    finished = trained.run(output, "--quantize", "null")
    assert finished.code == 0, finished.err
    assert not (output / "quantized").exists()
    assert (output / "wer_clean.txt").read_bytes() == (
        trained.output / "wer_clean.txt"
    ).read_bytes()


def test_command_line_merges_into_the_block(trained, tmp_path):
    output = tmp_path / "merged"
    change = "{weight_bits: 6, search: {cutoffs: [100, 99.5]}}"
    finished = trained.run(output, "--quantize", change)
    assert finished.code == 0, finished.err
    plan = read(output / "quantized/plan.json")
    assert (plan["weight_bits"], plan["activation_bits"]) == (6, 2)
    bits = {
        (layer["quant"]["weight_bits"], layer["quant"]["activation_bits"])
        for layer in plan["layers"]
    }
    assert bits == {(6, 2)}
    settings = plan["settings"]
    assert settings["search"]["cutoffs"] == [100.0, 99.5]
    # What the command line does not name stays as the YAML says.
    assert settings["search"]["num_utterances"] == 6
    assert settings["calibration"]["num_utterances"] == 4
    for unit in plan["units"]:
        tried = [row["cutoff"] for row in unit["curve"]]
        assert tried == ([100.0, 99.5] if unit["selected"] else [])


def test_debug(trained, tmp_path):
    output = tmp_path / "debug"
    arguments = trained.arguments(output, "--debug", block=BLOCK)
    script = RECIPE / "train.py"
    finished = trained.starter.run(script, *arguments, cwd=tmp_path)
    assert finished.code == 0, finished.err
    report = check_report(output / "quantized")
    for row in report["test"].values():
        # Two batches of one.
        assert row["float"]["utterances"] == 2
        assert row["quantized"]["utterances"] == 2
    plan = read(output / "quantized/plan.json")
    assert plan["search"]["num_utterances"] == 2


def test_training_and_quantization_at_once(trained, evaluated, tmp_path):
    output = tmp_path / "both"
    script = RECIPE / "train.py"
    arguments = trained.arguments(output, block=BLOCK)
    finished = trained.starter.run(script, *arguments, cwd=tmp_path)
    assert finished.code == 0, finished.err
    check_report(output / "quantized")
    # The block changes nothing of the training: losses and learning rates.
    assert logged(output)[0] == logged(trained.output)[0]
    assert len(list((output / "save").glob("CKPT*"))) == 1
    # And the freshly trained model gets the plan of its checkpoint.
    plan = read(output / "quantized/plan.json")
    known = read(evaluated[0] / "quantized/plan.json")
    for one in (plan, known):
        one["settings"].pop("output_folder", None)
    assert plan == known


def test_missing_checkpoint(trained, tmp_path):
    output = tmp_path / "nothing"
    arguments = trained.arguments(output, "--test_only", block=BLOCK)
    script = RECIPE / "train.py"
    finished = trained.starter.run(script, *arguments, cwd=tmp_path)
    assert finished.code != 0
    error = finished.err.splitlines()[-1]
    assert error.startswith("stablequant: ")
    assert "Traceback" not in finished.out + finished.err
    assert "FileNotFoundError: " in (output / "log.txt").read_text("utf-8")
    assert str(output / "save") in error
    assert "require_checkpoint" in error
    assert not list((output / "quantized").iterdir())
    assert not list(output.glob("wer_*.txt"))


def test_plan_is_used_again(trained, evaluated, tmp_path):
    known = evaluated[0] / "quantized"
    output = tmp_path / "again"
    plan = known / "plan.json"
    finished = trained.run(output, "--quantize", f"{{plan: {plan}}}")
    assert finished.code == 0, finished.err
    folder = output / "quantized"
    assert quantized_errors(folder) == quantized_errors(known)
    assert not (folder / "search.jsonl").exists()
    assert not (folder / "histograms.json").exists()
    check_report(folder)
    assert read(folder / "plan.json") == read(plan)


def test_attach_gives_the_plan_of_the_block(trained, evaluated, tmp_path):
    output = tmp_path / "attached"
    arguments = trained.test_arguments(output, block="")
    finished = trained.starter.run(
        RECIPE.parent / "attach.py",
        json.dumps(ATTACHED),
        *arguments,
        cwd=tmp_path,
    )
    assert finished.code == 0, finished.err
    folder, known = output / "quantized", evaluated[0] / "quantized"
    assert (folder / "plan.json").read_bytes() == (
        known / "plan.json"
    ).read_bytes()
    assert quantized_errors(folder) == quantized_errors(known)
