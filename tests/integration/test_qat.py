"""Quantization-aware training in an unedited recipe, and its folder."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import soundfile
import torch
from speechbrain.inference.ASR import EncoderASR

from speechbrain_stablequant import QuantizationPlan
from speechbrain_stablequant.folder.weights_file import load_checkpoint

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
LITTLE = ("--test_sets", "[clean]", "--train_loader", "{batch_size: 12}")


@pytest.fixture(scope="module")
def saved(trained) -> dict[str, bytes]:
    """What the recipe's own training has left."""
    return {
        path.name: path.read_bytes()
        for path in sorted(trained.save.rglob("*"))
        if path.is_file()
    }


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
    folder = written / name
    plan = QuantizationPlan.load(folder / "plan.json")
    checkpoint = load_checkpoint(folder)
    assert set(plan.tensors.layers) == set(checkpoint.integers)
    for key, tensors in plan.tensors.layers.items():
        found = checkpoint.integers[key].loaded()
        assert torch.equal(found.weight, tensors.weight)
        assert torch.equal(found.weight_scale, tensors.weight_scale)
        if tensors.bias is not None:
            assert torch.equal(found.bias, tensors.bias.half().float())
    for key, value in plan.tensors.floats.items():
        assert torch.allclose(
            checkpoint.floats[key], value, rtol=1e-3, atol=1e-6
        )
    audio = min((trained.root / "corpus").glob("clean-*.wav"))
    wave = torch.from_numpy(soundfile.read(audio, dtype="float32")[0])[None]
    outputs = [
        EncoderASR.from_hparams(
            source=str(folder), overrides={"backend": backend}
        ).encode_batch(wave, torch.ones(1))
        for backend in ("torch", "torch_int8")
    ]
    difference = (outputs[0] - outputs[1]).abs().mean()
    assert difference < 0.1 * outputs[0].abs().mean()


def test_the_recipe_does_not_notice(trained, saved, written):
    # Nothing was saved, and its float evaluation is what it was.
    now = {
        path.name: path.read_bytes()
        for path in sorted(trained.save.rglob("*"))
        if path.is_file()
    }
    assert now == saved
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
