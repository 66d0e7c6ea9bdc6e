"""The recipe's comparison with OpenVINO's NNCF."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ov = pytest.importorskip("openvino", reason="openvino is not installed")
pytest.importorskip("nncf", reason="nncf is not installed")

from openvino import opset13 as ops  # noqa: E402

RECIPE = Path(__file__).resolve().parents[2] / "recipes/LibriSpeech/ASR/CTC"


@pytest.fixture(scope="module")
def compare(script):
    return script("compare_nncf")


# -- matrix products of a graph ------------------------------------------------


def product(left, right):
    x = ops.parameter([2, 4], np.float32, name="x")
    return ov.Model([ops.matmul(left(x), right(), False, True)], [x])


def quantized(x):
    ends = [ops.constant(np.float32(v)) for v in (-1, 1, -1, 1)]
    return ops.fake_quantize(x, *ends, 256)


def int8():
    weight = ops.constant(np.ones((3, 4), np.int8))
    scale = ops.constant(np.full((3, 1), 0.1, np.float32))
    return ops.multiply(ops.convert(weight, np.float32), scale)


def half():
    weight = ops.constant(np.ones((3, 4), np.float16))
    return ops.convert(weight, np.float32)


@pytest.mark.parametrize(
    "left, right, integer",
    [
        (quantized, int8, 1),
        (lambda x: ops.transpose(quantized(x), [0, 1]), int8, 1),
        (lambda x: x, int8, 0),
        (quantized, half, 0),
        # A scale of a float activation makes no integers of it.
        (lambda x: ops.multiply(x, np.float32(2)), int8, 0),
        (lambda x: ops.relu(quantized(x)), int8, 0),
    ],
)
def test_products(compare, left, right, integer):
    found = compare.count_products(product(left, right))
    assert found == {"integer": integer, "float": 1 - integer}


# -- the float graph -----------------------------------------------------------


def test_every_layer_of_an_encoder_is_counted(compare, make_tiny_modules):
    modules = make_tiny_modules("wav2vec2-large")
    graph = compare.convert(list(modules.values()), torch.randn(1, 1000))
    layers = [
        child
        for child in modules.modules()
        if isinstance(child, nn.Linear | nn.Conv1d)
    ]
    # And two attentions, of query, key and value.
    count = {"integer": 0, "float": len(layers) + 2}
    assert compare.count_products(graph) == count


def test_graph_in_place_of_modules(compare, make_tiny_modules):
    modules = list(make_tiny_modules("hubert-base").values())
    graph = compare.convert(modules, torch.randn(1, 1000))
    wave = torch.randn(1, 1700)
    with torch.no_grad():
        wanted = nn.Sequential(*modules)(wave)
    forward = compare.compile_graph(graph, {"precision": "f32"})
    with compare.replaced(modules, forward):
        found = nn.Sequential(*modules)(wave)
        with pytest.raises(ValueError, match="not a batch of 2"):
            nn.Sequential(*modules)(wave.expand(2, -1))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert "forward" not in vars(modules[0])


def test_a_graph_that_differs_is_refused(compare, monkeypatch):
    """What the graph computes is compared with what the modules compute."""
    monkeypatch.setattr(
        compare, "compile_graph", lambda *_: lambda wave: wave + 1
    )
    with pytest.raises(ValueError, match="changes their output"):
        compare.convert([nn.Tanh()], torch.randn(1, 1000))


def test_options_of_the_backend(compare, monkeypatch):
    """NNCF's models and ours are compared with the same ones."""

    class Core:
        def compile_model(self, model, device, settings):
            return settings

    monkeypatch.setattr(compare, "core", Core)
    monkeypatch.setattr(compare, "forward_of", lambda compiled: compiled)
    options = {"threads": 3, "precision": "bf16", "cache_folder": "unused"}
    settings = compare.compile_graph(None, options)
    assert settings["INFERENCE_NUM_THREADS"] == 3
    assert settings["INFERENCE_PRECISION_HINT"] == "bf16"
    settings = compare.compile_graph(None, {})
    assert settings["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
    half = compare.cpu_class().bf16
    assert settings["INFERENCE_PRECISION_HINT"] == ("bf16" if half else "f32")


# -- what is refused before anything runs --------------------------------------


@pytest.mark.parametrize(
    "options, complaint",
    [
        (("--test_batch_size", "2"), "test_batch_size: NNCF's model takes one"),
        (
            ("--quantize", "{search: {batch_size: 4}}"),
            "quantize.search.batch_size: NNCF's model takes one",
        ),
        (("--quantize", "null"), "nncf, quantize: compare_nncf.py needs both"),
    ],
)
def test_refused_at_once(
    compare, few, tmp_path, monkeypatch, options, complaint
):
    command = ["compare_nncf.py", "hparams/compare_nncf.yaml", *options]
    command += ["--output_folder", str(tmp_path), "--data_folder", str(few)]
    monkeypatch.setattr("sys.argv", [*command, "--device", "cpu"])
    monkeypatch.chdir(RECIPE)
    monkeypatch.setattr(compare.train, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code.startswith(complaint)


# -- the whole -----------------------------------------------------------------


@pytest.mark.slow
def test_comparison(run, few, tmp_path):
    done = run(
        tmp_path / "out",
        *("--data_folder", few),
        *("--nncf", "{max_drop: 100, ranking_utterances: 2}"),
        "--quantize",
        "{calibration: {num_utterances: 4}, search: {num_utterances: 4, "
        "cutoffs: [100, 99.9]}, variants: [{name: max, method: max}, "
        "{name: stablequant, method: stablequant}]}",
        script="compare_nncf.py",
        hparams="hparams/compare_nncf.yaml",
    )
    assert done.code == 0, done.out + done.err
    folder = tmp_path / "out" / "quantized"
    table = json.loads((folder / "comparison.json").read_text("utf-8"))
    assert [row["variant"] for row in table["rows"]] == [
        *("max", "stablequant"),
        *("w8a8-nncf", "w8a8-nncf_accuracy_control"),
    ]
    ours, _, first, control = table["rows"]
    assert first["float"] == ours["float"]
    assert first["method"] == "nncf"
    assert first["backend"] == ours["backend"] == "openvino"
    files = [folder / "nncf" / f"model.{end}" for end in ("xml", "bin")]
    assert first["size_mb"] == sum(x.stat().st_size for x in files) / 1e6
    assert first["rtf"]["quantized"] > 0
    assert first["effort"]["utterances"] == {"calibration": 4}
    assert control["effort"]["transcribed"] == ["search"]
    # A drop that is allowed: nothing was made float again.
    assert first["operations"]["integer"] > 30
    assert control["operations"] == first["operations"]
    assert (folder / "nncf" / "wer_test-demo.txt").is_file()
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    assert "| w8a8-nncf_accuracy_control |" in text
    assert done.out.rstrip().endswith(f"comparison: {folder / 'comparison.md'}")
