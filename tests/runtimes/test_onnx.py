"""ONNX Runtime as a runtime: the same numbers, in integers."""

import statistics
from collections import Counter

import pytest
import torch
from tiny_layers import (
    describe,
    describe_lopsided,
    executed,
    extremes,
    worst_case,
)

from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.core.integer_layer import (
    IntegerLayer,
    integer_product,
)
from speechbrain_stablequant.runtimes.algorithms import window_rows
from speechbrain_stablequant.runtimes.forwards import encoder_forward
from speechbrain_stablequant.runtimes.onnx_.encoder import (
    position,
    unfold,
)
from speechbrain_stablequant.runtimes.onnx_.graph import Graph
from speechbrain_stablequant.runtimes.onnx_.model import export_onnx
from speechbrain_stablequant.runtimes.reference import ReferenceExecutor

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from speechbrain_stablequant.runtimes.onnx_.executor import (
    OnnxExecutor,
    open_session,
)
from speechbrain_stablequant.utils.patching import shadowed_forwards

LENGTHS = torch.tensor([4000, 2500])


def waves() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 4000) * (torch.arange(4000)[None] < LENGTHS[:, None])


@pytest.mark.parametrize("bits", [(8, 8), (6, 6)])
def test_executor_is_the_reference(tiny_model, bits):
    spec = describe(tiny_model, bits)
    execute, reference = OnnxExecutor(spec, threads=1), ReferenceExecutor(spec)
    out, expected = execute(waves(), LENGTHS), reference(waves(), LENGTHS)
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
    for row, other, n in zip(out, expected, LENGTHS, strict=True):
        frames = spec.frames(int(n))
        error = (row[:frames] - other[:frames]).abs().max()
        assert error <= 0.02 * other[:frames].abs().max()
    # Without a mask, and with other shapes in the same session. A tie that
    # falls the other way moves all that comes after it; they are rare.
    found = []
    for samples in range(2222, 4000, 222):
        wavs = waves()[:1, :samples]
        out, expected = execute(wavs, None), reference(wavs, None)
        assert out.shape == expected.shape
        found.append((out - expected).norm() / expected.norm())
    assert max(found) < 0.05 and statistics.median(found) < 1e-3


@pytest.mark.parametrize(
    "variant, bits", [("wav2vec2-base", (8, 8)), ("hubert-large", (6, 6))]
)
def test_offsets_and_rotation(tiny_model, lopsided_quants, bits):
    spec = describe_lopsided(tiny_model, lopsided_quants(tiny_model, bits))
    execute, reference = OnnxExecutor(spec, threads=1), ReferenceExecutor(spec)
    out, expected = execute(waves(), None), reference(waves(), None)
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= 0.02 * expected.abs().max()


def test_silence_of_no_frame_is_finite(make_tiny_model):
    model = make_tiny_model("hubert-large")
    spec = describe(model)
    wavs = torch.stack([waves()[0], torch.zeros(4000)])
    out = OnnxExecutor(spec, threads=1)(wavs, torch.tensor([4000, 3]))
    assert torch.isfinite(out).all()


def test_every_product_is_in_integers(tiny_model, tmp_path):
    spec = describe(tiny_model)
    assert_integers(spec, tmp_path)


@pytest.mark.parametrize("variant", ["wav2vec2-base", "hubert-large"])
def test_every_product_with_an_offset_is_in_integers(
    tiny_model, lopsided_quants, tmp_path
):
    spec = describe_lopsided(tiny_model, lopsided_quants(tiny_model))
    assert_integers(spec, tmp_path)


def assert_integers(spec, tmp_path):
    path = export_onnx(tmp_path / "m.onnx", spec)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "optimized.onnx")
    ops = Counter(node.op_type for node in model.graph.node)
    # The positional convolution is one product for each group.
    products = len(list(spec.layers())) - 1 + spec.pos_conv.groups
    assert ops["MatMulIntegerToFloat"] == products
    assert ops["DequantizeLinear"] == 0 and ops["Conv"] == 0
    # What is left are the two products of each attention, and the rotations.
    rotations = 0 if spec.rotation is None else 2
    products = 2 * len(spec.blocks) + rotations
    assert ops["MatMul"] + ops["FusedMatMul"] == products


def run_layer(layer: IntegerLayer, build, x: torch.Tensor, tmp_path):
    graph = Graph(unsigned=True)
    out = graph.name("out")
    graph.result(build(graph, graph.name("x")), out)
    model = graph.model({"x": [None] * x.dim()}, out, None, {})
    path = tmp_path / "layer.onnx"
    onnx.save(model, path)
    (result,) = open_session(path, threads=1).run(None, {"x": x.numpy()})
    return torch.from_numpy(result)


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("inputs,outputs", [(10, 32), (4096, 48), (1023, 7)])
def test_worst_case_linear(rows, inputs, outputs, tmp_path):
    layer = worst_case((outputs, inputs), "linear")
    q = extremes(2, rows, inputs)
    out = run_layer(
        layer,
        lambda graph, x: graph.linear(x, layer),
        q.float() * layer.activation_scale,
        tmp_path,
    )
    scale = layer.activation_scale * layer.weight_scale
    expected = integer_product(layer, q).float() * scale
    # Sums above 2^24 round once on their way to float32.
    assert torch.allclose(out, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel,stride", [(10, 5), (3, 2), (2, 2)])
def test_worst_case_convolution(kernel, stride, tmp_path):
    layer = worst_case((32, 256, kernel), "conv1d", stride=stride)
    q = extremes(1, 61, 256)

    def build(graph, x):
        rows = unfold(graph, graph.quantize(x, layer), layer)
        return graph.product(rows, layer, window_rows(layer.weight).t())

    out = run_layer(layer, build, q.float() * 0.25, tmp_path)
    scale = layer.activation_scale * layer.weight_scale
    product = integer_product(layer, q.transpose(1, 2)).float()
    expected = product.transpose(1, 2) * scale
    assert torch.allclose(out, expected, rtol=1e-6, atol=0)


def test_worst_case_positional_convolution(tmp_path):
    layer = worst_case((64, 16, 128), "conv1d", padding=64, groups=4)
    q = extremes(2, 40, 64)
    out = run_layer(
        layer,
        lambda graph, x: position(graph, layer, x, 1),
        q.float() * 0.25,
        tmp_path,
    )
    scale = layer.activation_scale * layer.weight_scale
    product = integer_product(layer, q.transpose(1, 2)).float()
    expected = product.transpose(1, 2)[:, :-1] * scale
    assert torch.allclose(out, expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_in_the_place_of_the_model(make_tiny_modules):
    modules = make_tiny_modules("wav2vec2-large")
    model = modules["wav2vec2"].model
    integers = executed({"wav2vec2": modules["wav2vec2"]}, ["wav2vec2"])
    spec = describe_encoder(model, "wav2vec2.model", integers)
    expected = ReferenceExecutor(spec)(waves(), LENGTHS)
    forward = encoder_forward(OnnxExecutor(spec, threads=1))
    with shadowed_forwards({model: forward}):
        out = modules["wav2vec2"](waves(), LENGTHS / 4000)
    frames = spec.frames(2500)
    error = (out[:, :frames] - expected[:, :frames]).abs().max()
    assert error <= 0.02 * expected.abs().max()


def test_refusals(make_tiny_model):
    spec = describe_encoder(make_tiny_model("hubert-base"), "w", {})
    with pytest.raises(ValueError, match="300 samples is too short"):
        OnnxExecutor(spec, threads=1)(torch.zeros(1, 300))
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(ValueError, match=r"has no cuda.*provider: cpu"):
            OnnxExecutor(spec, provider="cuda")
