"""ONNX files: what they compute, and what is in them."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from quantized_folder import write
from speechbrain.inference.ASR import EncoderASR
from speechbrain.nnet.linear import Linear
from torch import nn
from torch.nn import functional as F

from speechbrain_stablequant.core.affine import GELU_MIN, fake_quantize, qmax
from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.core.integer_layer import FloatLayer, IntegerLayer
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.export import export_folder
from speechbrain_stablequant.folder.weights_file import load_checkpoint
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.model.rotation import (
    attach_rotation,
    random_rotation,
)
from speechbrain_stablequant.model.wrapper import StoredEncoder
from speechbrain_stablequant.runtimes.algorithms import window_rows
from speechbrain_stablequant.runtimes.cpu import cpu_class, executed_integers
from speechbrain_stablequant.runtimes.onnx_ import model as export_model
from speechbrain_stablequant.runtimes.onnx_.encoder import unfold
from speechbrain_stablequant.runtimes.onnx_.graph import Graph
from speechbrain_stablequant.runtimes.onnx_.model import (
    describe_head,
    export_onnx,
)
from speechbrain_stablequant.runtimes.reference import (
    ReferenceExecutor,
    apply_layer,
)

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

LENGTHS = torch.tensor([4000, 2500])


def waves() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 4000) * (torch.arange(4000)[None] < LENGTHS[:, None])


def integers_of(modules, target, bits=(8, 8), keep=lambda name: True):
    """Integer layers of some modules, with a scale that cuts a little, as
    this CPU executes them."""
    integers = {
        x.name: integer_layer(x, LayerQuant(*bits, 3.0, "max"))
        for x in find_layers(modules, target)
        if keep(x.name)
    }
    return executed_integers(integers, cpu_class())


def run(path, wavs, lengths) -> torch.Tensor:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    inputs = {"wave": wavs.numpy(), "lengths": lengths.numpy()}
    return torch.from_numpy(session.run(None, inputs)[0])


def run_graph(graph: Graph, **inputs: torch.Tensor) -> torch.Tensor:
    """Runs a graph whose last node makes its result."""
    out = graph.name("out")
    graph.result(graph.nodes[-1].output[0], out)
    shapes = {k: [None] * v.dim() for k, v in inputs.items()}
    model = graph.model(shapes, out, None, {})
    session = ort.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    arrays = {k: v.numpy() for k, v in inputs.items()}
    return torch.from_numpy(session.run(None, arrays)[0])


def assert_same(spec, out, expected, tolerance=1e-5):
    assert out.shape == expected.shape
    assert torch.isfinite(out).all()
    for row, other, n in zip(out, expected, LENGTHS, strict=True):
        frames = spec.frames(int(n))
        error = (row[:frames] - other[:frames]).abs().max()
        assert error <= tolerance * other[:frames].abs().max()


@pytest.mark.parametrize("target", export_model.TARGETS)
def test_float_parts(tiny_model, target, tmp_path):
    spec = describe_encoder(tiny_model, "w", {})
    path = export_onnx(tmp_path / "m.onnx", spec, target=target)
    expected = ReferenceExecutor(spec)(waves(), LENGTHS)
    assert_same(spec, run(path, waves(), LENGTHS), expected)


@pytest.mark.parametrize("target", export_model.TARGETS)
@pytest.mark.parametrize("bits", [(8, 8), (6, 6), (8, 4)])
def test_integers(tiny_model, target, bits, tmp_path):
    def keep(name):
        # One convolution and one Linear stay float, as a plan may say.
        return "conv_layers.2" not in name and "layers.1.att" not in name

    integers = integers_of({"w": tiny_model}, ["w"], bits, keep)
    integers = executed_integers(integers, cpu_class())
    spec = describe_encoder(tiny_model, "w", integers)
    path = export_onnx(tmp_path / "m.onnx", spec, target=target)
    onnx.checker.check_model(str(path), full_check=True)
    expected = ReferenceExecutor(spec)(waves(), LENGTHS)
    # A value at a tie may round the other way.
    assert_same(spec, run(path, waves(), LENGTHS), expected, 0.02)
    # Weights are stored as integers.
    model = onnx.load(path)
    stored = {x.name: x for x in model.graph.initializer}
    for name in integers:
        # The positional convolution has one tensor for each group.
        pattern = re.escape(name) + r"\.weight(_\d+)?"
        parts = [
            onnx.numpy_helper.to_array(tensor)
            for key, tensor in stored.items()
            if re.fullmatch(pattern, key)
        ]
        assert {x.dtype for x in parts} == {np.dtype(np.int8)}
        assert sum(x.size for x in parts) == integers[name].weight.numel()


@pytest.mark.parametrize("target", export_model.TARGETS)
@pytest.mark.parametrize(
    "variant, bits", [("wav2vec2-base", (8, 8)), ("hubert-large", (6, 6))]
)
def test_offsets_and_rotation(
    tiny_model, lopsided_quants, bits, target, tmp_path
):
    if tiny_model.config.do_stable_layer_norm:
        attach_rotation(tiny_model.encoder, random_rotation(32))
    quants = lopsided_quants(tiny_model, bits)
    integers = {
        x.name: integer_layer(x, quants[x.name])
        for x in find_layers({"w": tiny_model}, ["w"])
    }
    integers = executed_integers(integers, cpu_class())
    spec = describe_encoder(tiny_model, "w", integers)
    path = export_onnx(tmp_path / "m.onnx", spec, target=target)
    onnx.checker.check_model(str(path), full_check=True)
    expected = ReferenceExecutor(spec)(waves(), LENGTHS)
    # A value at a tie that rounds the other way moves all behind it.
    assert_same(spec, run(path, waves(), LENGTHS), expected, 0.05)
    zeros = {
        int(onnx.numpy_helper.to_array(x))
        for x in onnx.load(path).graph.initializer
        if x.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        and not x.dims
    }
    middle = 128 if target == "onnxruntime" else 0
    assert zeros == {middle + x.zero_point() for x in spec.layers()}
    assert len(zeros) == 2


@pytest.mark.parametrize("target", export_model.TARGETS)
def test_batch_and_time_are_dynamic(make_tiny_model, target, tmp_path):
    model = make_tiny_model("hubert-base")
    spec = describe_encoder(model, "w", integers_of({"w": model}, ["w"]))
    path = export_onnx(tmp_path / "m.onnx", spec, target=target)
    for batch, samples in ((1, 3001), (3, 1777)):
        wavs = torch.randn(batch, samples)
        lengths = torch.full((batch,), samples)
        expected = ReferenceExecutor(spec)(wavs, None)
        out = run(path, wavs, lengths)
        assert out.shape == expected.shape
        assert (out - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("kernel,stride", [(10, 5), (3, 2), (2, 2), (4, 1)])
def test_unfolding_is_the_convolution(kernel, stride):
    torch.manual_seed(0)
    weight = torch.randn(6, 5, kernel)
    layer = FloatLayer("conv", "conv1d", weight, None, stride)
    # Every remainder of a stride, and inputs of exactly one kernel.
    for samples in range(kernel, kernel + 2 * stride):
        graph = Graph()
        rows = unfold(graph, graph.name("x"), layer)
        graph.product(rows, layer, window_rows(weight).t())
        x = torch.randn(2, samples, 5)
        out = run_graph(graph, x=x).transpose(1, 2)
        expected = apply_layer(layer, x.transpose(1, 2))
        assert out.shape == expected.shape
        assert (out - expected).abs().max() < 1e-4


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_grid_is_that_of_the_simulation(bits, unsigned):
    """No integer below -qmax, and ties go to even."""
    limit = qmax(bits)
    scale = torch.tensor([0.5])  # a power of two: ties are exact
    layer = IntegerLayer(
        "w", "linear", torch.eye(1), torch.ones(1), 8, scale, bits, None
    )
    graph = Graph(unsigned)
    graph.dequantize(graph.quantize(graph.name("x"), layer), layer)
    x = torch.arange(-4 * limit - 9, 4 * limit + 9) / 8
    out = run_graph(graph, x=x)
    assert torch.equal(out, fake_quantize(x, scale, bits))
    assert out.min() == -limit * 0.5 and out.max() == limit * 0.5
    # An even number of steps: the ties stay where they are.
    offset = (limit // 2 * 2) * 0.5
    layer = replace(layer, activation_offset=offset)
    graph = Graph(unsigned)
    graph.dequantize(graph.quantize(graph.name("x"), layer), layer)
    out = run_graph(graph, x=x)
    assert torch.equal(out, fake_quantize(x - offset, scale, bits) + offset)


def test_gelu_needs_no_clip_only_where_it_cannot_reach():
    def ops(amax, bits):
        layer = IntegerLayer(
            "w",
            "linear",
            torch.eye(1),
            torch.ones(1),
            8,
            torch.tensor([amax / qmax(bits)]),
            bits,
            None,
        )
        graph = Graph()
        graph.quantize("x", layer, GELU_MIN)
        return [node.op_type for node in graph.nodes]

    assert ops(2.0, 8) == ["QuantizeLinear"]
    assert ops(0.1, 8) == ["Clip", "QuantizeLinear"]
    assert ops(2.0, 6) == ["Clip", "QuantizeLinear"]
    assert F.gelu(torch.linspace(-3, 3, 10001)).min() > GELU_MIN


@pytest.mark.parametrize("target", export_model.TARGETS)
@torch.no_grad()
def test_normalization_is_inside(make_tiny_modules, target, tmp_path):
    modules = make_tiny_modules("wav2vec2-large")
    model = modules["wav2vec2"].model
    spec = describe_encoder(model, "wav2vec2.model", {})
    head = describe_head({k: modules[k] for k in ("enc", "ctc_lin")}, {})
    path = export_onnx(
        tmp_path / "m.onnx",
        spec,
        head,
        normalize_wav=True,
        output_norm=True,
        target=target,
    )
    loud = 7.0 * waves() + 0.3
    wavs = F.layer_norm(loud, loud.shape[1:])
    hidden = ReferenceExecutor(spec)(wavs, LENGTHS)
    hidden = F.layer_norm(hidden, hidden.shape[1:])
    expected = modules["ctc_lin"](modules["enc"](hidden))
    assert_same(spec, run(path, loud, LENGTHS), expected, 1e-4)


@torch.no_grad()
def test_head_in_integers(make_tiny_modules, tmp_path):
    modules = make_tiny_modules("hubert-large")
    integers = integers_of(modules, list(modules))
    model = modules["wav2vec2"].model
    spec = describe_encoder(model, "wav2vec2.model", integers)
    head = describe_head({k: modules[k] for k in ("enc", "ctc_lin")}, integers)
    names = [p.name for p in head if isinstance(p, IntegerLayer)]
    assert names == [n for n in integers if not n.startswith("wav2vec2")]
    path = export_onnx(tmp_path / "m.onnx", spec, head)
    x = ReferenceExecutor(spec)(waves(), LENGTHS)
    for part in head:
        x = (
            apply_layer(part, x)
            if isinstance(part, IntegerLayer)
            else F.leaky_relu(x, part.attributes["alpha"])
        )
    assert_same(spec, run(path, waves(), LENGTHS), x, 0.02)


def test_metadata(make_tiny_model, tmp_path):
    model = make_tiny_model("hubert-base")
    integers = integers_of({"w": model}, ["w"], (8, 6))
    spec = describe_encoder(model, "w", integers)
    path = export_onnx(
        tmp_path / "m.onnx",
        spec,
        normalize_wav=True,
        sample_rate=8000,
        metadata={"labels": "abc"},
    )
    props = {x.key: x.value for x in onnx.load(path).metadata_props}
    assert props.pop("format") == "speechbrain_stablequant.onnx 1"
    bits = json.loads(props.pop("bits"))
    weight_bits = 8 if cpu_class().exact else 7
    assert bits == {name: [weight_bits, 6] for name in integers}
    assert props == {
        "sample_rate": "8000",
        "input_normalization": "layer_norm",
        "output_normalization": "none",
        "labels": "abc",
    }


def test_without_lengths(make_tiny_model, tmp_path):
    """A model that is not told what is padding takes it for audio."""
    spec = describe_encoder(make_tiny_model("wav2vec2-large"), "w", {})
    path = export_onnx(tmp_path / "m.onnx", spec, use_lengths=False)
    session = ort.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    assert [x.name for x in session.get_inputs()] == ["wave"]
    (out,) = session.run(None, {"wave": waves().numpy()})
    expected = ReferenceExecutor(spec)(waves(), None)
    error = (torch.from_numpy(out) - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()


def folder_of(make_tiny_model, tmp_path, **options):
    """What a run writes, of a recognizer with a Linear head."""
    modules = {
        "wav2vec2": StoredEncoder(
            make_tiny_model("wav2vec2-large"), True, False
        ),
        "ctc_lin": Linear(input_size=32, n_neurons=12),
    }
    head = (
        "ctc_lin: !new:speechbrain.nnet.linear.Linear\n"
        "  input_size: 32\n"
        "  n_neurons: 12\n"
    )
    write(tmp_path / "quantized", modules, {"ctc_lin": head}, **options)
    return tmp_path / "quantized"


@pytest.fixture
def quantized_folder(make_tiny_model, tmp_path):
    return folder_of(make_tiny_model, tmp_path)


@pytest.mark.parametrize(
    "name", ["layers.0.feed_forward.output_dense", "k_proj", "ctc_lin.w"]
)
@pytest.mark.parametrize("narrow", [False, True])
def test_inputs_that_stay_float(name, narrow, make_tiny_model, tmp_path):
    folder = folder_of(make_tiny_model, tmp_path, float_inputs=[name])
    path = export_folder(folder, tmp_path / "m.onnx", reduce_range=narrow)
    out = run(path, waves(), LENGTHS).log_softmax(-1)
    asr = EncoderASR.from_hparams(
        source=str(folder), overrides={"backend": "torch"}
    )
    expected = asr.mods.encoder(waves(), LENGTHS / 4000)
    error = (out - expected).norm() / expected.norm()
    assert error < (0.05 if narrow else 0.01)


def test_quantized_folder(quantized_folder, tmp_path):
    # With the integers that the runtimes of this CPU execute.
    narrow = not cpu_class().exact
    path = export_folder(
        quantized_folder, tmp_path / "m.onnx", reduce_range=narrow
    )
    asr = EncoderASR.from_hparams(
        source=str(quantized_folder),
        overrides={"backend": "torch_int8" if narrow else "torch"},
    )
    loud = 5.0 * waves() + 0.2
    expected = asr.mods.encoder(loud, LENGTHS / 4000)
    spec = describe_encoder(
        asr.mods.encoder.parts["wav2vec2"].model,
        "wav2vec2.model",
        load_checkpoint(quantized_folder).integers,
    )
    out = run(path, loud, LENGTHS).log_softmax(-1)
    assert_same(spec, out, expected, 0.02)
    props = {x.key: x.value for x in onnx.load(path).metadata_props}
    assert json.loads(props["labels"]) == ["<blank>", *" ABCDEFGHIJ"]
    assert props["blank_index"] == "0" and props["sample_rate"] == "16000"
    assert props["input_normalization"] == "layer_norm"


def test_weights_of_seven_bits(quantized_folder, tmp_path):
    """For CPUs that add up int8 in 16 bits."""
    for narrow in (False, True):
        path = export_folder(
            quantized_folder, tmp_path / "m.onnx", reduce_range=narrow
        )
        model = onnx.load(path)
        (bits,) = (x for x in model.metadata_props if x.key == "bits")
        found = {tuple(x) for x in json.loads(bits.value).values()}
        assert found == {(7 if narrow else 8, 8)}
        widest = max(
            np.abs(onnx.numpy_helper.to_array(x).astype(int)).max()
            for x in model.graph.initializer
            if x.data_type == onnx.TensorProto.INT8 and len(x.dims) > 1
        )
        assert widest == (63 if narrow else 127)


def test_folder_without_recognizer(quantized_folder, tmp_path):
    for name in ("hyperparams.yaml", "recognizer.json"):
        (quantized_folder / name).unlink()
    with pytest.raises(ValueError, match=r"holds no quantized recognizer"):
        export_folder(quantized_folder, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_refusals(make_tiny_model, tmp_path, monkeypatch):
    spec = describe_encoder(make_tiny_model("hubert-base"), "w", {})
    path = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="target: 'trt' is none of onnx"):
        export_onnx(path, spec, target="trt")
    with pytest.raises(ValueError, match=r"enc: LSTM in the head.*head="):
        describe_head({"enc": nn.LSTM(4, 4)}, {})
    conv = FloatLayer("enc", "conv1d", torch.zeros(2, 2, 1), None)
    with pytest.raises(ValueError, match="enc: a conv1d in the head"):
        export_onnx(path, spec, [conv])
    with pytest.raises(OSError, match="no_folder"):
        export_onnx(tmp_path / "no_folder" / "m.onnx", spec)
    monkeypatch.setattr(export_model, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="GB; quantize more layers"):
        export_onnx(path, spec)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"speechbrain_stablequant\[onnx\]"):
        Graph()
    assert list(tmp_path.iterdir()) == []
