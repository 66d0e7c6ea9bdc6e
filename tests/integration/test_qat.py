"""Quantization-aware training in an unedited recipe, and its folder."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from trained_recipe import (
    ONE_SET,
    check_holds_plan,
    check_integers_near_simulation,
    contents,
)

from speechbrain_stablequant import QuantizationPlan

BLOCK = """
quantize: !apply:speechbrain_stablequant.register
    target: [wav2vec2, enc, ctc_lin]
    weight_bits: 3
    activation_bits: 3
    method: qat
    qat: {epochs: 2, lr: 0.004}
    calibration: {num_utterances: 4}
    search: {num_utterances: 6}
    output_folder: !ref <output_folder>/quantized
"""
VARIANTS = """\
    variants:
        - {name: mse, method: mse}
        - {name: ste}
        - name: lsq
          qat: {epochs: 1, learn_scales: True, distill: 0.5, keep: last}
"""
# Few steps, and one test set.
LITTLE = (*ONE_SET, "--train_loader", "{batch_size: 12}")


@pytest.fixture(scope="module")
def saved(trained) -> dict[str, str]:
    """What the recipe's own training has left."""
    return contents(trained.save)


@pytest.fixture(scope="module")
def written(trained, saved) -> Path:
    """The folder of a run of all variants."""
    output = trained.root / "qat"
    finished = trained.run(output, *LITTLE, block=BLOCK + VARIANTS)
    assert finished.code == 0, finished.out + finished.err
    return output / "quantized"


def training_of(folder: Path) -> list[dict]:
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    return plan["search"]["training"]


def test_training_helps(written):
    history = training_of(written / "ste")
    assert [entry["epoch"] for entry in history] == [0, 1, 2]
    errors = [entry["errors"] for entry in history]
    assert min(errors) < errors[0]
    losses = [entry["valid_loss"] for entry in history]
    assert min(losses) < 0.8 * losses[0]
    report = (written / "ste/report.md").read_text("utf-8")
    assert "Epoch of training" in report
    assert "WER alone" not in report.partition("How it was measured")[2]
    history = training_of(written / "lsq")
    assert [entry["errors"] for entry in history] == [None, None]


def test_scales_learn_only_when_asked(written):
    plans = {
        name: QuantizationPlan.load(written / name / "plan.json")
        for name in ("mse", "ste", "lsq")
    }
    quants = {name: plan.quants() for name, plan in plans.items()}
    assert quants["ste"] == quants["mse"]
    assert all(
        quants["lsq"][name].activation_amax != quant.activation_amax
        for name, quant in quants["mse"].items()
    )
    for name in ("ste", "lsq"):
        assert "qat" in plans[name].settings
        assert plans[name].fingerprint == plans["mse"].fingerprint
        norms = plans[name].tensors.floats
        assert any("layer_norm" in norm for norm in norms)
    assert "qat" not in plans["mse"].settings


@pytest.mark.parametrize("name", ["ste", "lsq"])
def test_folder_holds_what_was_trained(trained, written, name):
    check_holds_plan(written / name)
    plan = QuantizationPlan.load(written / name / "plan.json")
    assert set(plan.tensors.layers) == set(plan.quants())
    audio = min((trained.root / "corpus").glob("clean-*.wav"))
    check_integers_near_simulation(written / name, audio)


def test_the_recipe_does_not_notice(trained, saved, written):
    # Nothing was saved, and its float evaluation is what it was.
    assert contents(trained.save) == saved
    one = (trained.output / "wer_clean.txt").read_text("utf-8")
    two = (written.parent / "wer_clean.txt").read_text("utf-8")
    assert one == two


def test_killed_training_goes_on(trained, written):
    script = Path(__file__).parent / "recipe_without_mention/train.py"
    output = trained.root / "killed_qat"
    arguments = trained.test_arguments(output, *LITTLE, block=BLOCK)
    process = trained.starter.start(script, *arguments, cwd=output.parent)
    folder = output / "quantized/finished_epochs"
    deadline = time.monotonic() + 60
    while not list(folder.glob("*_epoch1.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    assert not (output / "quantized/plan.json").exists()
    finished = trained.run(output, *LITTLE, block=BLOCK)
    assert finished.code == 0, finished.out + finished.err
    assert training_of(output / "quantized") == training_of(written / "ste")
    one, two = (
        (path / "plan.safetensors").read_bytes()
        for path in (output / "quantized", written / "ste")
    )
    assert one == two
    assert not list(folder.glob("*_epoch*"))
