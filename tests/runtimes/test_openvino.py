"""OpenVINO as a runtime: the same integers, and whether they are integers."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_layers import (
    describe,
    describe_lopsided,
    executed,
    extremes,
    worst_case,
)

from speechbrain_stablequant.core.encoder_spec import (
    EncoderSpec,
    describe_encoder,
)
from speechbrain_stablequant.core.integer_layer import (
    FloatLayer,
    IntegerLayer,
    integer_product,
)
from speechbrain_stablequant.runtimes.cpu import (
    cpu_class,
)
from speechbrain_stablequant.runtimes.forwards import encoder_forward
from speechbrain_stablequant.runtimes.geometry import CONVOLUTION, NATIVE
from speechbrain_stablequant.runtimes.reference import ReferenceExecutor

ov = pytest.importorskip("openvino", reason="needs the extra cpu")

from speechbrain_stablequant.runtimes.openvino_ import core as core_module
from speechbrain_stablequant.runtimes.openvino_ import executor
from speechbrain_stablequant.runtimes.openvino_.executor import (
    OpenVINOExecutor,
)
from speechbrain_stablequant.runtimes.openvino_.graph import GraphBuilder
from speechbrain_stablequant.utils.patching import shadowed_forwards

LENGTHS = torch.tensor([4300, 2500, 3000])

#: One thread, and float32 around the integer products.
EXACT = {"threads": 1, "precision": "f32"}

SEEDS = range(1, 9)


def waves(seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    mask = torch.arange(4300)[None] < LENGTHS[:, None]
    return torch.randn(3, 4300) * mask


def errors(spec, out, expected, lengths=LENGTHS) -> list[float]:
    """Of each utterance the largest error of a real frame, relative to the
    largest value."""
    assert out.shape == expected.shape and out.dtype == torch.float32
    assert torch.isfinite(out).all()
    pairs = zip(out, expected, lengths, strict=True)
    return [
        float((row - other)[: spec.frames(int(n))].abs().max())
        / float(other[: spec.frames(int(n))].abs().max())
        for row, other, n in pairs
    ]


def assert_same(found: list[float]):
    """A value at a tie may round the other way, and that moves everything
    behind it: not in most utterances, and not far."""
    found = sorted(found)
    assert found[len(found) // 4] < 1e-5 and found[-1] < 0.5, found


def with_front(spec: EncoderSpec, algorithm: str) -> EncoderSpec:
    """The encoder with the algorithm of its feature extractor."""
    names = {stage.conv.name for stage in spec.convs}
    return spec.with_layers(
        lambda x: replace(x, algorithm=algorithm) if x.name in names else x
    )


def executed_nodes(compiled, kind: str) -> list[dict[str, str]]:
    """What the plugin says of the executed nodes of a kind."""
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {k: v.astype(str) for k, v in node.get_rt_info().items()}
        if info["layerType"] == kind:
            found.append(info)
    return found


@pytest.mark.parametrize("bits", [(8, 8), (6, 6)])
@pytest.mark.parametrize("front", [NATIVE, CONVOLUTION])
def test_executor_is_the_reference(tiny_model, bits, front):
    spec = with_front(describe(tiny_model, bits=bits), front)
    execute = OpenVINOExecutor(spec, **EXACT)
    reference = ReferenceExecutor(spec)
    batches, alone = [], []
    for seed in SEEDS:
        wavs = waves(seed)
        expected = reference(wavs, LENGTHS)
        batches += errors(spec, execute(wavs, LENGTHS), expected)
        # Without a mask, with another length.
        wavs = wavs[:1, :3333]
        expected = reference(wavs, None)
        alone += errors(spec, execute(wavs, None), expected, [3333])
    assert_same(batches)
    assert_same(alone)


@pytest.mark.parametrize(
    "variant, bits", [("wav2vec2-base", (8, 8)), ("hubert-large", (6, 6))]
)
def test_offsets_and_rotation(tiny_model, lopsided_quants, bits):
    spec = describe_lopsided(tiny_model, lopsided_quants(tiny_model, bits))
    execute, reference = (
        OpenVINOExecutor(spec, **EXACT),
        ReferenceExecutor(spec),
    )
    found = []
    for wavs in map(waves, SEEDS[:4]):
        expected = reference(wavs, LENGTHS)
        found += errors(spec, execute(wavs, LENGTHS), expected)
    assert_same(found)


@pytest.mark.parametrize(
    "keep_float",
    [("conv_layers",), ("attention", "pos_conv"), ("projection", "dense")],
    ids=lambda parts: parts[0],
)
@pytest.mark.parametrize("front", [NATIVE, CONVOLUTION])
def test_layers_left_float(tiny_model, keep_float, front):
    spec = with_front(describe(tiny_model, keep_float=keep_float), front)
    kept = [x.name for x in spec.layers() if isinstance(x, FloatLayer)]
    assert kept and len(kept) < len(list(spec.layers()))
    execute = OpenVINOExecutor(spec, **EXACT)
    reference = ReferenceExecutor(spec)
    found = []
    for wavs in map(waves, SEEDS):
        expected = reference(wavs, LENGTHS)
        found += errors(spec, execute(wavs, LENGTHS), expected)
    assert_same(found)


def test_half_precision_is_near(tiny_model):
    spec = describe(tiny_model)
    out = OpenVINOExecutor(spec, threads=1, precision="bf16")(waves(), LENGTHS)
    expected = ReferenceExecutor(spec)(waves(), LENGTHS)
    # A rounding to bfloat16 moves some values to the next integer.
    assert max(errors(spec, out, expected)) < 0.4
    frames = spec.frames(LENGTHS[0])
    cosine = torch.cosine_similarity(out[0, :frames], expected[0, :frames])
    assert cosine.mean() > 0.99


def test_silence_of_no_frame_is_finite(make_tiny_model):
    spec = describe(make_tiny_model("hubert-large"))
    wavs = torch.stack([waves()[0], torch.zeros(4300)])
    out = OpenVINOExecutor(spec, threads=1)(wavs, torch.tensor([4300, 3]))
    assert torch.isfinite(out).all()


def test_the_same_input_gives_the_same_output(tiny_model):
    """In whatever order inputs come, and however often in a row."""
    spec = describe(tiny_model)
    execute = OpenVINOExecutor(spec, **EXACT)
    inputs = [torch.randn(1, n) for n in (3000, 9000, 3010, 13000)]
    expected = [execute(wavs) for wavs in inputs]
    order = [0] * 6 + [1, 0, 2, 3, 3, 3, 3, 0, 2, 1]
    for i in order:
        assert torch.equal(execute(inputs[i]), expected[i])


@pytest.mark.parametrize("unit", [1, 64])
def test_no_real_frame_depends_on_the_padding(tiny_model, unit, monkeypatch):
    spec = describe(tiny_model)
    execute = OpenVINOExecutor(spec, **EXACT)
    shapes = []
    original = executor.first_inputs

    def keep(*args):
        shapes.append(original(*args).shape)
        return original(*args)

    monkeypatch.setattr(executor, "first_inputs", keep)
    found = []
    for wavs in map(waves, SEEDS):
        expected = execute(wavs, LENGTHS)
        with monkeypatch.context() as patch:
            patch.setattr(executor, "FRAME_UNIT", unit)
            found += errors(spec, execute(wavs, LENGTHS), expected)
    assert_same(found)
    # It did compute another length.
    assert len(set(shapes)) == 4


def test_few_shapes():
    """What memory is bounded by, and what the bound costs."""

    def padded(frames):
        return executor.round_frames(
            frames, executor.FRAME_UNIT, executor.FRAME_STEPS
        )

    assert padded(499) == 500  # 10 s
    lengths = range(1, 1500)  # up to 30 s
    assert all(n <= padded(n) < n + max(10, n / 16) for n in lengths)
    assert len({padded(n) for n in lengths}) == 67
    sizes = {
        part.stop - part.start
        for batch in range(1, 100)
        for part in executor.batch_parts(batch)
    }
    assert sizes == {1, 2, 4, 8, 16}
    for batch in range(1, 100):
        rows = torch.arange(batch)
        parts = [rows[part] for part in executor.batch_parts(batch)]
        assert torch.equal(torch.cat(parts), rows)


def test_batches_are_computed_in_parts(tiny_model):
    spec = describe(tiny_model)
    execute, reference = (
        OpenVINOExecutor(spec, **EXACT),
        ReferenceExecutor(spec),
    )
    lengths = torch.tensor([1500, 4300, 700, 2500, 4100, 3000, 1200])
    mask = torch.arange(4300)[None] < lengths[:, None]
    wavs = torch.randn(7, 4300) * mask
    out, expected = execute(wavs, lengths), reference(wavs, lengths)
    assert_same(errors(spec, out, expected, lengths))
    # Each in its own place, whatever part it is in.
    again = execute(wavs.flip(0), lengths.flip(0)).flip(0)
    assert_same(errors(spec, again, expected, lengths))


def test_requests_are_not_shared(make_tiny_model):
    execute = OpenVINOExecutor(
        describe(make_tiny_model("hubert-large")), **EXACT
    )
    with execute._request() as one, execute._request() as two:
        assert one is not two
    assert len(execute._idle) == 2
    with pytest.raises(KeyError), execute._request():
        raise KeyError
    assert len(execute._idle) == 1


@pytest.mark.parametrize("threads", [None, 1])
def test_calls_side_by_side(make_tiny_model, threads, monkeypatch):
    """With a number of threads, as many as the CPU has room for."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(core_module, "_cores", lambda: 2)
    spec = describe(make_tiny_model("hubert-large"))
    settings = OpenVINOExecutor(spec, threads=threads).settings
    streams = 1 if threads is None else 2
    assert settings["NUM_STREAMS"] == streams
    assert settings["INFERENCE_NUM_THREADS"] == 2
    monkeypatch.setattr(core_module, "_cores", lambda: 1)
    settings = OpenVINOExecutor(spec, threads=3).settings
    assert settings["NUM_STREAMS"] == 1
    assert settings["INFERENCE_NUM_THREADS"] == 3


def test_models_of_one_shape_are_no_more(make_tiny_model, caplog):
    spec = describe(make_tiny_model("hubert-large"))
    OpenVINOExecutor(spec, max_models=2, **EXACT)
    (record,) = [r for r in caplog.records if "max_models" in r.message]
    assert "has no effect" in record.message


def test_a_compiled_graph_is_found_again(make_tiny_model, tmp_path):
    spec = describe(make_tiny_model("wav2vec2-large"))
    first = OpenVINOExecutor(spec, cache_folder=tmp_path, **EXACT)
    out = first(waves(), LENGTHS)
    (blob,) = tmp_path.glob("*.blob")
    again = OpenVINOExecutor(spec, cache_folder=tmp_path, **EXACT)
    assert again._compiled.get_property("LOADED_FROM_CACHE")
    assert torch.equal(again(waves(), LENGTHS), out)
    # Other weights are another graph.
    other = describe(make_tiny_model("wav2vec2-large"))
    fresh = OpenVINOExecutor(other, cache_folder=tmp_path, **EXACT)
    assert not fresh._compiled.get_property("LOADED_FROM_CACHE")
    assert len(list(tmp_path.glob("*.blob"))) == 2
    assert blob.is_file()


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_every_layer_is_executed_in_integers(tiny_model, precision):
    if precision == "bf16" and not cpu_class().bf16:
        pytest.skip("this CPU does not multiply bfloat16")
    assert_integers(describe(tiny_model), precision)


def assert_integers(spec, precision):
    compiled = OpenVINOExecutor(spec, threads=1, precision=precision)._compiled
    linear = executed_nodes(compiled, "FullyConnected")
    convs = executed_nodes(compiled, "Convolution")
    # Windows are multiplied; the positional convolution is one.
    assert len(convs) == 1
    # A float fallback of an integer layer would be named so here.
    kinds = Counter(x["runtimePrecision"] for x in linear)
    assert kinds.pop("u8") == len(spec.convs) + 1 + 6 * len(spec.blocks)
    assert kinds.total() == (0 if spec.rotation is None else 2)
    assert {x["runtimePrecision"] for x in convs} <= {"u8", "i8"}


@pytest.mark.parametrize(
    "variant, precision",
    [("wav2vec2-base", "f32"), ("hubert-large", "auto")],
)
def test_layers_with_offsets_are_executed_in_integers(
    tiny_model, lopsided_quants, precision
):
    spec = describe_lopsided(tiny_model, lopsided_quants(tiny_model))
    assert_integers(spec, precision)


def strided(builder: GraphBuilder, x: ov.Node, layer: IntegerLayer) -> ov.Node:
    """A convolution of any length as a product, in and out as a convolution."""
    y = builder.strided(builder.turn(x), layer)
    return builder.turn(y)


def run_layer(layer: IntegerLayer, q: torch.Tensor, build) -> torch.Tensor:
    """A layer as a graph of its own, on inputs that lie on its grid."""
    builder = GraphBuilder(None)
    x = builder.input("x", [-1] * q.dim())
    model = ov.Model([build(builder, x, layer)], [x], "layer")
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": 1,
    }
    compiled = ov.Core().compile_model(model, "CPU", settings)
    conv = build is GraphBuilder.conv
    kind = "Convolution" if conv else "FullyConnected"
    (node,) = executed_nodes(compiled, kind)
    assert node["runtimePrecision"] in ("u8", "i8")
    # Those of an input of 0 are the zero point.
    x = (q.float() - layer.zero_point()) * layer.activation_scale
    (out,) = compiled({"x": x.numpy()}).values()
    return torch.from_numpy(np.array(out))


def assert_exact(layer: IntegerLayer, q: torch.Tensor, build):
    scale = layer.activation_scale * layer.weight_scale
    if layer.kind == "conv1d":
        scale = scale[:, None]
    sums = layer.weight.flatten(1).sum(1, dtype=torch.int64)
    sums = sums.view(-1, 1) if layer.kind == "conv1d" else sums
    product = integer_product(layer, q) - layer.zero_point() * sums
    # Two float32 roundings: of the sum, and of the zero point's share.
    tolerance = 1e-6 * 256 * layer.weight[0].numel() * 127
    error = (run_layer(layer, q, build) / scale - product).abs().max()
    assert error <= max(tolerance, 1e-6 * product.abs().max())


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("inputs,outputs", [(10, 32), (4096, 48), (1023, 7)])
def test_worst_case_linear(rows, inputs, outputs):
    layer = worst_case((outputs, inputs), "linear")
    assert_exact(layer, extremes(1, rows, inputs), GraphBuilder.linear)
    offset = float(113 * layer.activation_scale)
    layer = replace(layer, activation_offset=offset)
    assert_exact(layer, extremes(1, rows, inputs), GraphBuilder.linear)


@pytest.mark.parametrize(
    "shape,geometry",
    [
        ((32, 1, 10), {"stride": 5}),
        ((32, 256, 3), {"stride": 2}),
        ((64, 16, 128), {"padding": 64, "groups": 4}),
    ],
    ids=["first", "strided", "positional"],
)
def test_worst_case_convolution(shape, geometry):
    layer = worst_case(shape, "conv1d", **geometry)
    q = extremes(1, 61, shape[1] * layer.groups).transpose(1, 2)
    assert_exact(layer, q.contiguous(), GraphBuilder.conv)


@pytest.mark.parametrize(
    "shape,stride",
    [((32, 4, 10), 5), ((32, 64, 3), 2), ((32, 8, 2), 2), ((32, 8, 3), 4)],
)
def test_worst_case_product_of_windows(shape, stride):
    layer = worst_case(shape, "conv1d", stride=stride)
    q = extremes(1, stride * 12, shape[1]).transpose(1, 2)
    assert_exact(layer, q.contiguous(), strided)


def test_worst_case_without_vnni():
    """The class of CPU that this one may not be: the products saturate there,
    and 7-bit weights keep them from it."""
    script = """
import sys, torch
sys.path[:0] = sys.argv[1:]
import test_openvino as t
assert not t.cpu_class().exact
layer = t.worst_case((48, 1024), "linear")
assert layer.weight_bits == 7
q = t.extremes(1, 5, 1024)
t.assert_exact(layer, q, t.GraphBuilder.linear)
# What would happen with 8 bits, so that OpenVINO does heed the variable.
wide = t.replace(layer, weight=layer.weight.sign() * 127, weight_bits=8)
try:
    t.assert_exact(wide, q, t.GraphBuilder.linear)
except AssertionError:
    pass
else:
    sys.exit("8-bit weights are exact here: are 7 bits still needed?")
layer = t.worst_case((32, 256, 3), "conv1d", stride=2)
q = t.extremes(1, 60, 256).transpose(1, 2).contiguous()
t.assert_exact(layer, q, t.GraphBuilder.conv)
t.assert_exact(layer, q, t.strided)
"""
    here = Path(__file__).resolve().parent
    result = subprocess.run(
        [sys.executable, "-c", script, str(here)],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_a_signal_after_executors_have_gone(tmp_path):
    """What OpenVINO gave to signal handlers is still there."""
    script = """
import os, signal, sys
sys.path[:0] = sys.argv[1:]
import conftest, test_openvino as t
# Also where the tests run in the background, which ignores the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
model = conftest.build_tiny_model("hubert-base")
spec = t.describe(model)
made = [t.OpenVINOExecutor(spec, threads=1) for _ in range(3)]
for _ in range(3):
    del made[0]
try:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), 0)
except KeyboardInterrupt:
    sys.exit(3)
"""
    here = Path(__file__).resolve().parent
    result = subprocess.run(
        [sys.executable, "-c", script, str(here.parent), str(here)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3, result.stderr


@torch.no_grad()
def test_in_the_place_of_the_model(make_tiny_modules):
    modules = make_tiny_modules("wav2vec2-large")
    model = modules["wav2vec2"].model
    integers = executed({"wav2vec2": modules["wav2vec2"]}, ["wav2vec2"])
    spec = describe_encoder(model, "wav2vec2.model", integers)
    reference = ReferenceExecutor(spec)
    forward = encoder_forward(OpenVINOExecutor(spec, **EXACT))
    found = []
    for wavs in map(waves, SEEDS):
        with shadowed_forwards({model: forward}):
            out = modules["wav2vec2"](wavs, LENGTHS / 4300)
        found += errors(spec, out, reference(wavs, LENGTHS))
    assert_same(found)


def test_refusals(make_tiny_model):
    spec = describe_encoder(make_tiny_model("hubert-base"), "w", {})
    with pytest.raises(ValueError, match="300 samples is too short"):
        OpenVINOExecutor(spec, threads=1)(torch.zeros(1, 300))


def test_one_grid_is_quantized_once(make_tiny_model):
    spec = describe(make_tiny_model("hubert-large"))
    model = GraphBuilder(spec).build()
    kinds = [node.get_type_name() for node in model.get_ops()]
    # Query, key and value share theirs.
    assert kinds.count("FakeQuantize") == len(list(spec.layers())) - 2 * len(
        spec.blocks
    )
    # With other ranges they do not.
    block = spec.blocks[0]
    key = replace(block.key, activation_scale=block.key.activation_scale * 2)
    blocks = (replace(block, key=key), *spec.blocks[1:])
    other = GraphBuilder(replace(spec, blocks=blocks)).build()
    more = [node.get_type_name() for node in other.get_ops()]
    assert more.count("FakeQuantize") == kinds.count("FakeQuantize") + 1
