"""The file for TensorRT against the rules of its explicit quantization, as its
documentation and its parser have them."""

import re
from dataclasses import replace

import numpy as np
import pytest
import quantized_folder
import torch

from speechbrain_stablequant.export import export_for
from speechbrain_stablequant.export.tensorrt_ import PROFILE
from speechbrain_stablequant.folder.recognizer import load_folder

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

# The newest that TensorRT 10.0 reads.
OPSET = 20
# Those that TensorRT has, of those that our graphs are made of.
OPERATORS = {
    *("Add", "Clip", "Concat", "Conv", "DequantizeLinear", "Div", "Gelu"),
    *("Identity", "InstanceNormalization", "LayerNormalization", "LeakyRelu"),
    *("MatMul", "Mul", "QuantizeLinear", "ReduceMean", "Relu", "Reshape"),
    *("Slice", "Softmax", "Sqrt", "Sub", "Tanh", "Transpose", "Unsqueeze"),
}


@pytest.fixture(scope="module", params=["wav2vec2-large", "hubert-base"])
def folder(request, make_tiny_modules, tmp_path_factory):
    torch.manual_seed(7)
    place = tmp_path_factory.mktemp("tensorrt") / "quantized"
    quantized_folder.write(place, make_tiny_modules(request.param))
    return place


@pytest.fixture(scope="module")
def out(folder):
    return export_for(folder, folder.parent / "out", "tensorrt")


class Reader:
    """A model's nodes by what they make and take, and its constants."""

    def __init__(self, path):
        self.model = onnx.load(path)
        onnx.checker.check_model(self.model, full_check=True)
        self.nodes = self.model.graph.node
        self.constants = {
            x.name: onnx.numpy_helper.to_array(x)
            for x in self.model.graph.initializer
        }
        self.maker = {out: x for x in self.nodes for out in x.output}

    def takers(self, node):
        """Nodes that take what a node makes, and as which input."""
        return [
            (x, list(x.input).index(node.output[0]))
            for x in self.nodes
            if node.output[0] in x.input
        ]

    def attribute(self, node, name):
        (found,) = (x for x in node.attribute if x.name == name)
        return onnx.helper.get_attribute_value(found)

    def of(self, *kinds):
        return [x for x in self.nodes if x.op_type in kinds]


@pytest.fixture(scope="module")
def graph(out):
    return Reader(out / "model.onnx")


def test_operators_and_opset(graph):
    (opset,) = graph.model.opset_import
    assert (opset.domain, opset.version) == ("", OPSET)
    assert {x.op_type for x in graph.nodes} <= OPERATORS


def test_quantizers_are_symmetric_and_constant(graph):
    found = graph.of("QuantizeLinear", "DequantizeLinear")
    assert found
    for node in found:
        scale, zero = (graph.constants[x] for x in node.input[1:])
        assert scale.dtype == np.float32 and (scale > 0).all()
        assert np.isfinite(scale).all()
        assert zero.dtype == np.int8 and not zero.any()
        assert zero.shape == scale.shape


def test_activations_have_one_scale(graph):
    """And go from Q through DQ to the product alone."""
    found = graph.of("QuantizeLinear")
    assert found
    for node in found:
        assert node.input[0] not in graph.constants
        assert graph.constants[node.input[1]].shape == ()
        for taker, _ in graph.takers(node):
            assert taker.op_type == "DequantizeLinear"
            assert list(taker.input[1:]) == list(node.input[1:])
            for product, place in graph.takers(taker):
                assert product.op_type in ("Conv", "MatMul") and place == 0


def test_weights_have_one_scale_for_each_channel(folder, graph):
    found = [
        x for x in graph.of("DequantizeLinear") if x.input[0] in graph.constants
    ]
    names = set()
    for node in found:
        weight, scale, _ = (graph.constants[x] for x in node.input)
        assert weight.dtype == np.int8 and np.abs(weight.astype(int)).max() > 63
        assert weight.min() >= -127
        ((product, place),) = graph.takers(node)
        assert place == 1
        axis = {"Conv": 0, "MatMul": 1}[product.op_type]
        assert graph.attribute(node, "axis") == axis
        assert scale.shape == (weight.shape[axis],)
        assert product.op_type == "Conv" or weight.ndim == 2
        # The other factor is quantized, too.
        assert graph.maker[product.input[0]].op_type == "DequantizeLinear"
        names.add(node.input[0].removesuffix(".weight"))
    assert names == set(load_folder(folder)[0].integers())


def test_kernels_are_given(graph):
    """The parser does not take them from weights that are dequantized."""
    found = graph.of("Conv")
    assert found
    for node in found:
        weight = graph.constants[graph.maker[node.input[1]].input[0]]
        shape = graph.attribute(node, "kernel_shape")
        assert tuple(shape) == weight.shape[2:]
        assert len(node.input) < 3 or node.input[2] in graph.constants


def test_batch_and_time_are_dynamic_within_the_profile(out, graph):
    (wave,) = graph.model.graph.input
    axes = wave.type.tensor_type.shape.dim
    assert [x.dim_param for x in axes] == ["batch", "samples"]
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "not run here: no GPU" in text and "--stronglyTyped" in text
    shown = re.findall(rf"--(\w+)Shapes={wave.name}:(\d+)x(\d+)", text)
    assert [x for x, *_ in shown] == ["min", "opt", "max"]
    sizes = [(int(batch), int(samples)) for _, batch, samples in shown]
    assert sizes == list(PROFILE) == sorted(sizes)


def test_computes_what_the_folder_does(folder, out):
    """As a float graph with quantizers, exact on any CPU."""
    recognizer = load_folder(folder, "torch")[0]
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.graph_optimization_level = level
    session = ort.InferenceSession(
        str(out / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    for batch, samples in ((1, 16000), (3, 9000)):
        torch.manual_seed(samples)
        wave = 0.1 * torch.randn(batch, samples)
        (logits,) = session.run(["logits"], {"wave": wave.numpy()})
        expected = recognizer(wave, torch.ones(batch)).numpy()
        assert logits.shape == expected.shape
        same = logits.argmax(-1) == expected.argmax(-1)
        assert same.mean() > 0.95


def test_zero_points_are_refused(make_tiny_modules, tmp_path, monkeypatch):
    plain, row = quantized_folder.integer_layer, quantized_folder.LayerPlan

    def moved(name, quant):
        offset = 20 * 3.0 / 127 if name.endswith("output_dense") else 0.0
        return replace(quant, activation_offset=offset)

    changes = {
        "integer_layer": lambda x, quant: plain(x, moved(x.name, quant)),
        "LayerPlan": lambda name, unit, kind, quant, *rest: row(
            name, unit, kind, moved(name, quant), *rest
        ),
    }
    for name, change in changes.items():
        monkeypatch.setattr(quantized_folder, name, change)
    modules = make_tiny_modules("hubert-large")
    quantized_folder.write(tmp_path / "quantized", modules)
    with pytest.raises(ValueError, match=r"plus: {asymmetric: False}"):
        export_for(tmp_path / "quantized", tmp_path / "out", "tensorrt")
    assert [x.name for x in tmp_path.iterdir()] == ["quantized"]
