"""The recipe as its user runs it: on the demo, and on trained checkpoints."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "recipes" / "LibriSpeech" / "ASR" / "CTC" / "demo"
#: Checkpoints and data, beside the project.
SHARED = ROOT.parent / "shared"
RATES = {"WER", "CER", "utterances"}


def check_run(
    done: subprocess.CompletedProcess, output: Path, name: str
) -> dict:
    """Asserts that a run ended well, and gives its report.

    Arguments
    ---------
    done : subprocess.CompletedProcess
        The run.
    output : Path
        Its output folder.
    name : str
        Of the test set.

    Returns
    -------
    dict
        What ``report.json`` holds.
    """
    assert done.code == 0, done.out + done.err
    folder = output / "quantized"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(report["test"]) == [name]
    row = report["test"][name]
    assert row["float"].keys() >= RATES
    assert row["quantized"].keys() >= RATES
    assert row["delta_wer"] == pytest.approx(
        row["quantized"]["WER"] - row["float"]["WER"]
    )
    low, high = row["delta_wer_ci"]
    assert low <= row["delta_wer"] <= high
    assert 0 < report["size_mb"]["quantized"] < report["size_mb"]["float"]
    assert report["rtf"].keys() == {"float", "quantized"}
    names = [unit["name"] for unit in report["units"]]
    assert names[:2] == ["conv.0", "conv.1"]
    assert names[-1] == "head"
    for unit in report["units"]:
        assert unit.keys() >= {"name", "delta_wer", "selected", "cutoff"}
    # The last words are the table and where the report is.
    lines = done.out.rstrip().splitlines()
    assert lines[-1] == f"report: {folder / 'report.html'}"
    table = "\n".join(lines[-12:])
    assert name in table
    assert f"{row['quantized']['WER']:.2f}" in table
    for file in ("report.html", "report.md", "plan.json"):
        assert (folder / file).stat().st_size > 0
    return report


# As README's first command, which the continuous integration runs.
@pytest.mark.slow
def test_demo(run, tmp_path):
    output = tmp_path / "demo"
    block = (
        "{calibration: {num_utterances: 8}, "
        "search: {num_utterances: 8, cutoffs: [100, 99.9]}}"
    )
    done = run(output, "--quantize", block)
    report = check_run(done, output, "test-demo")
    row = report["test"]["test-demo"]
    audio = list((DEMO / "LibriSpeech" / "test-demo").rglob("*.flac"))
    assert row["float"]["utterances"] == len(audio)
    assert row["float"]["WER"] <= 10
    # Eight bits do not break it.
    assert row["quantized"]["WER"] <= row["float"]["WER"] + 10
    assert report["search"]["num_utterances"] == 8
    assert report["method"] == "stablequant"
    assert report["bits"] == {"weight": 8, "activation": 8}


@pytest.mark.slow
def test_demo_shorthands(run, tmp_path, few):
    output = tmp_path / "short"
    done = run(
        output,
        *("--method", "max", "--quant_bits", "6", "--data_folder", few),
    )
    report = check_run(done, output, "test-demo")
    assert report["method"] == "max"
    assert report["bits"] == {"weight": 6, "activation": 6}
    assert "search" not in report
    assert not any(unit["selected"] for unit in report["units"])
    # 6 of 32 bits, and what is not quantized.
    size = report["size_mb"]
    assert size["quantized"] < 0.3 * size["float"]
    assert not (output / "quantized" / "search.jsonl").exists()


def test_demo_with_a_wrong_method(run, tmp_path):
    done = run(tmp_path / "wrong", "--method", "maximum")
    assert done.code != 0
    line = done.err.splitlines()[-1]
    assert line.startswith("stablequant: quantize.method: 'maximum' is not one")
    assert "Traceback" not in done.out + done.err
    assert not (tmp_path / "wrong" / "quantized").exists()


@pytest.mark.parametrize("model", ["wav2vec2", "hubert"])
@pytest.mark.slow
@pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"needs checkpoints and data in {SHARED}"
)
def test_trained_checkpoint(model, run, tmp_path):
    output = tmp_path / model
    done = run(
        output,
        "--debug",
        *("--wav2vec2_hub", SHARED / "models" / model),
        *("--data_folder", SHARED / "data" / "LibriSpeech"),
        *("--dev_splits", "[mini-dev]", "--test_splits", "[mini-test]"),
        *("--quantize", "{search: {cutoffs: [100, 99.9]}}"),
    )
    report = check_run(done, output, "mini-test")
    row = report["test"]["mini-test"]
    # Two batches of one.
    assert row["float"]["utterances"] == 2
    assert row["float"]["WER"] < 100
    names = [unit["name"] for unit in report["units"]]
    assert names == [
        *(f"conv.{index}" for index in range(7)),
        *("projection", "pos_conv"),
        *(f"block.{index}" for index in range(6)),
        "head",
    ]
