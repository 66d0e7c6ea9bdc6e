"""Faults put into runtimes on purpose: a recognizer and a run find them."""

import importlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_folder
import torch
from trained_recipe import ONE_SET

from speechbrain_stablequant.folder.encoder_config import CONFIG_FILE
from speechbrain_stablequant.folder.weights_file import (
    load_checkpoint,
    save_checkpoint,
)
from speechbrain_stablequant.runtimes.probe import ProbeError

EXECUTORS = {
    "openvino": "openvino_.executor:OpenVINOExecutor",
    "torch_int8": "torch_int8.executor:TorchInt8Executor",
    "onnx": "onnx_.executor:OnnxExecutor",
}
LINE = "computes something else on this machine: the encoder's output is off by"
SCRIPT = Path(__file__).resolve().parent / "faulty_recipe.py"


@pytest.fixture(scope="module")
def folder(make_tiny_modules, tmp_path_factory) -> Path:
    """A folder of eight bits."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("probe") / "folder"
    tiny_folder.write(path, make_tiny_modules("wav2vec2-large"))
    return path


def twice_a_scale(spec):
    """The encoder with one scale off by two."""
    block = spec.blocks[0]
    down = replace(block.down, weight_scale=2 * block.down.weight_scale)
    blocks = (replace(block, down=down), *spec.blocks[1:])
    return replace(spec, blocks=blocks)


@pytest.fixture
def break_runtime(monkeypatch):
    """Puts a fault into what a runtime makes of an encoder."""

    def do(backend, change=twice_a_scale):
        name, _, executor = EXECUTORS[backend].partition(":")
        if backend != "torch_int8":
            pytest.importorskip(backend.replace("onnx", "onnxruntime"))
        module = importlib.import_module(
            f"speechbrain_stablequant.runtimes.{name}"
        )
        make = getattr(module, executor)

        def make_wrong(spec, **options):
            return make(change(spec), **options)

        monkeypatch.setattr(module, executor, make_wrong)

    return do


def fails(spec):
    raise RuntimeError("could not create a primitive\n  at line 7")


def lines_with(caplog, word) -> list[str]:
    """What was logged about something."""
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if word in line]


# -- a recognizer --------------------------------------------------------------


@pytest.mark.parametrize("backend", EXECUTORS)
def test_a_named_runtime_raises(folder, break_runtime, backend):
    break_runtime(backend)
    recognizer = tiny_folder.load(folder, backend)
    for _ in range(2):  # and stays unused
        with pytest.raises(ProbeError) as caught:
            recognizer(tiny_folder.wave(1))
        text = str(caught.value)
        assert text.startswith(f"backend: {backend} {LINE}")
        assert text.endswith("; write backend: auto") and "\n" not in text
        assert recognizer.runtime is None


@pytest.mark.parametrize("change", [twice_a_scale, fails])
def test_auto_goes_on_with_one_line(folder, break_runtime, change, caplog):
    break_runtime("openvino", change)
    recognizer = tiny_folder.load(folder, "auto")
    with caplog.at_level(logging.WARNING):
        found = recognizer(tiny_folder.wave(1))
    assert recognizer.runtime == "torch_int8"
    named = tiny_folder.load(folder, "torch_int8")
    assert torch.equal(found, named(tiny_folder.wave(1)))
    (line,) = lines_with(caplog, "auto")
    assert line.startswith("backend auto: openvino is not used on device cpu")
    assert "\n" not in line
    if change is twice_a_scale:
        assert LINE in line and line.endswith("is allowed")
    else:
        assert "could not create a primitive at line 7" in line


def test_the_simulation_is_the_last_resort(folder, break_runtime, caplog):
    break_runtime("openvino")
    break_runtime("torch_int8")
    recognizer = tiny_folder.load(folder, "auto")
    with caplog.at_level(logging.WARNING):
        found = recognizer(tiny_folder.wave(2))
    assert recognizer.runtime == "torch"
    assert torch.equal(
        found, tiny_folder.load(folder, "torch")(tiny_folder.wave(2))
    )
    for name in ("openvino", "torch_int8"):
        assert f"backend auto: {name} is not used on device cpu" in caplog.text


def test_nothing_answers_where_nothing_is_right(
    folder, break_runtime, monkeypatch
):
    from speechbrain_stablequant.runtimes import simulated

    make_layer = simulated.make_layer

    def wrong(layer, **options):
        return make_layer(
            replace(layer, weight_scale=1.5 * layer.weight_scale), **options
        )

    break_runtime("openvino")
    break_runtime("torch_int8")
    monkeypatch.setattr(simulated, "make_layer", wrong)
    recognizer = tiny_folder.load(folder, "auto")
    with pytest.raises(ProbeError, match="backend: torch computes something"):
        recognizer(tiny_folder.wave(1))


def test_a_wrong_head_is_found(folder, monkeypatch):
    from speechbrain_stablequant.runtimes.torch_int8 import head_layer as layer

    make_layer = layer.make_layer

    def wrong(one):
        if one.name.startswith("ctc_lin"):
            one = replace(one, weight_scale=2 * one.weight_scale)
        return make_layer(one)

    monkeypatch.setattr(layer, "make_layer", wrong)
    recognizer = tiny_folder.load(folder, "torch_int8")
    with pytest.raises(ProbeError, match="the head's output is off by"):
        recognizer(tiny_folder.wave(1))


def test_a_folder_without_a_probe_loads_with_one_line(folder, tmp_path, caplog):
    """Those of earlier versions."""
    old = load_checkpoint(folder)
    assert old.probe is not None
    for name in (CONFIG_FILE, "label_encoder.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_checkpoint(
        tmp_path, old.plan, old.integers, old.floats, companions=[CONFIG_FILE]
    )
    with caplog.at_level(logging.WARNING):
        recognizer = tiny_folder.load(tmp_path, "torch_int8")
    lines = [
        r.getMessage() for r in caplog.records if "probe" in r.getMessage()
    ]
    (line,) = lines
    assert str(tmp_path) in line and "without a probe" in line
    expected = tiny_folder.load(folder, "torch_int8")(tiny_folder.wave(1))
    assert torch.equal(recognizer(tiny_folder.wave(1)), expected)


# -- a run ---------------------------------------------------------------------


BLOCK = """
quantize: !apply:speechbrain_stablequant.register
    target: [wav2vec2, enc, ctc_lin]
    method: max
    calibration: {num_utterances: 2}
    output_folder: !ref <output_folder>/quantized
"""


def run(trained, output: Path, block: str):
    """The recipe where OpenVINO is wrong."""
    pytest.importorskip("openvino")
    arguments = trained.test_arguments(output, *ONE_SET, block=block)
    return trained.starter.run(SCRIPT, *arguments, cwd=output.parent)


def test_a_run_goes_on_with_another_runtime(trained):
    """Before it searches, and the report says why."""
    output = trained.root / "faulty"
    finished = run(trained, output, BLOCK)
    assert finished.code == 0, finished.out + finished.err
    report = json.loads((output / "quantized" / "report.json").read_text())
    assert report["backend"] == "torch_int8"
    (line,) = (w for w in report["warnings"] if "openvino" in w)
    assert line.startswith(f"Not executed by openvino: {LINE}")
    assert f"warning: {line}" in finished.out


def test_a_run_by_a_named_runtime_ends_before_it_searches(trained):
    output = trained.root / "faulty_named"
    finished = run(trained, output, BLOCK + "    backend: openvino\n")
    assert finished.code != 0
    assert f"backend: openvino {LINE}" in finished.out + finished.err
    assert not (output / "quantized" / "histograms.json").exists()
