"""The torch int8 runtime: operator by operator exact, and as a whole the
reference up to rounding."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_layers import describe, describe_lopsided, extremes, worst_case
from torch.nn import functional as F

from speechbrain_stablequant.core.affine import qmax, quantize
from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.core.integer_layer import (
    FloatLayer,
    IntegerLayer,
    integer_product,
    reference_forward,
)
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.runtimes.cpu import (
    CpuClass,
    cpu_class,
    executed_integers,
)
from speechbrain_stablequant.runtimes.reference import ReferenceExecutor
from speechbrain_stablequant.runtimes.torch_int8 import executor
from speechbrain_stablequant.runtimes.torch_int8.conv import (
    GroupedConv,
    make_conv,
)
from speechbrain_stablequant.runtimes.torch_int8.executor import (
    TorchInt8Executor,
    attend,
)
from speechbrain_stablequant.runtimes.torch_int8.front import (
    FeatureExtractor,
    Stage,
)
from speechbrain_stablequant.runtimes.torch_int8.head_layer import make_layer
from speechbrain_stablequant.runtimes.torch_int8.input_forms import (
    ZERO,
    Floats,
    Grid,
)
from speechbrain_stablequant.runtimes.torch_int8.linear import (
    SharedInput,
    make_linear,
    padded_rows,
    rows_of,
)
from speechbrain_stablequant.utils.patching import shadowed_forwards

LENGTHS = torch.tensor([4000, 2500, 3001])
SPREAD = {(8, 8): 0.02, (6, 6): 0.06, (4, 8): 0.06}


def waves() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4000) * (torch.arange(4000)[None] < LENGTHS[:, None])


def errors(spec, out, expected, lengths) -> torch.Tensor:
    """Differences at real frames, relative to the largest value."""
    parts = []
    for row, other, n in zip(out, expected, lengths, strict=True):
        frames = spec.frames(int(n))
        scale = other[:frames].abs().max()
        parts.append(((row - other)[:frames] / scale).flatten())
    return torch.cat(parts).abs()


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def bf16(request, monkeypatch) -> bool:
    """A CPU without and with arithmetic in bfloat16. The latter is computed
    on any CPU, if slowly."""
    kind = CpuClass(cpu_class().name, request.param)
    monkeypatch.setattr(executor, "cpu_class", lambda: kind)
    return request.param


@pytest.mark.parametrize("bits", [(8, 8), (6, 6), (4, 8)])
def test_executor_is_the_reference(tiny_model, bits, bf16):
    spec = describe(tiny_model, bits)
    execute, reference = (
        TorchInt8Executor(spec, threads=1),
        ReferenceExecutor(spec),
    )
    wavs = waves()
    cases = [
        (wavs, LENGTHS),
        (wavs[:1], None),
        (wavs[1:2, :2501], torch.tensor([2501])),
        (wavs[:, :3333], None),
    ]
    largest = []
    for batch, lengths in cases:
        out, expected = execute(batch, lengths), reference(batch, lengths)
        assert out.dtype == torch.float32 and out.shape == expected.shape
        assert torch.isfinite(out).all()
        real = [batch.shape[1]] * len(batch) if lengths is None else lengths
        for one in zip(out, expected, real, strict=True):
            error = errors(spec, *([x] for x in one))
            largest.append(error.max())
            # A value near a tie may go to the other integer and move all
            # that follows; the fewer bits, the further.
            assert error.square().mean().sqrt() < SPREAD[bits]
    # Without such a value it is float rounding. In bfloat16 there is always
    # one.
    assert bf16 or min(largest) < 2e-6


@pytest.mark.parametrize(
    "variant, bits", [("wav2vec2-base", (8, 8)), ("hubert-large", (6, 6))]
)
def test_offsets_and_rotation(tiny_model, lopsided_quants, bits, bf16):
    spec = describe_lopsided(tiny_model, lopsided_quants(tiny_model, bits))
    execute, reference = TorchInt8Executor(spec), ReferenceExecutor(spec)
    expected = reference(waves(), LENGTHS)
    error = errors(spec, execute(waves(), LENGTHS), expected, LENGTHS)
    assert error.square().mean().sqrt() < SPREAD[bits]


@pytest.mark.parametrize(
    "keep_float",
    [
        ("",),  # all of them
        ("conv_layers.0.conv", "conv_layers.3.conv"),
        ("conv_layers.6.conv", "projection", "pos_conv_embed.conv"),
        ("k_proj", "layers.0.attention.out_proj", "output_dense"),
        ("q_proj", "v_proj", "intermediate_dense"),
    ],
)
def test_float_layers(tiny_model, keep_float, bf16):
    spec = describe(tiny_model, (8, 8), keep_float)
    kept = [x.name for x in spec.layers() if isinstance(x, FloatLayer)]
    assert len(kept) >= 2
    out = TorchInt8Executor(spec)(waves(), LENGTHS)
    expected = ReferenceExecutor(spec)(waves(), LENGTHS)
    error = errors(spec, out, expected, LENGTHS)
    assert error.square().mean().sqrt() < 0.02


def test_other_scales_of_query_key_and_value(make_tiny_model):
    model = make_tiny_model("hubert-large")
    layers = find_layers({"w": model}, ["w"])
    amax = {"q_proj": 2.0, "k_proj": 3.0, "v_proj": 3.0}
    integers = {
        x.name: integer_layer(
            x, LayerQuant(8, 8, amax.get(x.name.split(".")[-1], 4.0))
        )
        for x in layers
    }
    spec = describe_encoder(
        model, "w", executed_integers(integers, cpu_class())
    )
    execute = TorchInt8Executor(spec)
    assert len(execute.blocks[0].qkv.products) == 2
    expected = ReferenceExecutor(spec)(waves(), LENGTHS)
    error = errors(spec, execute(waves(), LENGTHS), expected, LENGTHS)
    assert error.square().mean().sqrt() < 0.02


def test_one_product_for_one_scale(make_tiny_model):
    spec = describe(make_tiny_model("hubert-base"), (8, 8))
    execute = TorchInt8Executor(spec)
    assert all(len(block.qkv.products) == 1 for block in execute.blocks)


@pytest.mark.parametrize("variant", ["wav2vec2-base", "hubert-large"])
def test_chunks_leave_no_seam(make_tiny_model, variant, monkeypatch):
    # More than one stretch of frames, and a last one of one frame.
    spec = describe(make_tiny_model(variant), (8, 8))
    execute = TorchInt8Executor(spec)
    samples = 400 + 320 * 12
    wavs = torch.randn(1, samples)
    assert spec.frames(samples) == 13
    whole = execute.features(wavs, [samples])[0]
    monkeypatch.setattr(FeatureExtractor, "stretch", 4)
    monkeypatch.setattr(Stage, "rows", 48)
    parts = execute.features(wavs, [samples])[0]
    assert torch.equal(parts, whole)


def test_padded_and_silent_rows(make_tiny_model):
    spec = describe(make_tiny_model("hubert-large"), (8, 8))
    execute = TorchInt8Executor(spec)
    wavs = torch.stack([waves()[0], torch.zeros(4000)])
    out = execute(wavs, torch.tensor([4000, 3]))
    assert torch.isfinite(out).all() and not out[1].any()
    assert torch.equal(execute(wavs[1:], torch.tensor([3])), out[1:])
    # What is padded does not reach what is real.
    padded = execute(waves()[1:2], LENGTHS[1:2])
    alone = execute(waves()[1:2, :2500], None)
    assert torch.allclose(padded[:, : alone.shape[1]], alone, atol=1e-5)
    with pytest.raises(ValueError, match="an input of 100 samples is too"):
        execute(torch.zeros(1, 100))


def test_threads_of_a_call_only(make_tiny_model):
    spec = describe(make_tiny_model("hubert-large"), (8, 8))
    before = torch.get_num_threads()
    seen = []

    def block(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return x

    execute = TorchInt8Executor(spec, threads=before + 1)
    execute.blocks = [block]
    execute(waves()[:1])
    assert seen == [before + 1] and torch.get_num_threads() == before


def test_unsupported_front_end(make_tiny_model):
    model = make_tiny_model("hubert-large")
    model.feature_extractor.conv_layers[2].conv.padding = (1,)
    with pytest.raises(ValueError, match=r"conv_layers.2.*backend: torch"):
        TorchInt8Executor(describe_encoder(model, "w", {}))


def exact(layer: IntegerLayer, q: torch.Tensor) -> torch.Tensor:
    scale = layer.activation_scale * layer.weight_scale
    if layer.kind == "conv1d":
        scale = scale[:, None]
    return integer_product(layer, q).float() * scale


@pytest.mark.parametrize("rows", [1, 5, 64, 500])
@pytest.mark.parametrize("inputs,outputs", [(10, 32), (4096, 48), (1023, 7)])
def test_worst_case_linear(rows, inputs, outputs):
    layer = worst_case((outputs, inputs), "linear")
    q = extremes(2, rows, inputs)
    out = make_layer(layer)(q.float() * layer.activation_scale)
    # Sums above 2^24 round once on their way to float32.
    assert torch.allclose(out, exact(layer, q), rtol=1e-6, atol=0)


GEOMETRIES = [
    ((32, 64, 3), {"stride": 2}),
    ((24, 1, 10), {"stride": 5}),
    ((64, 16, 16), {"padding": 8, "groups": 4}),
    ((64, 4, 5), {"padding": 2, "groups": 16, "stride": 3}),
    ((32, 32, 3), {"padding": 2, "dilation": 2}),
]


@pytest.mark.parametrize("shape,geometry", GEOMETRIES)
def test_worst_case_convolution(shape, geometry):
    layer = worst_case(shape, "conv1d", **geometry)
    channels = shape[1] * geometry.get("groups", 1)
    q = extremes(2, channels, 61)
    out = make_layer(layer)(q.float() * layer.activation_scale)
    assert torch.allclose(out, exact(layer, q), rtol=1e-6, atol=0)


CAPPED = """
import torch
from speechbrain_stablequant.runtimes.cpu import cpu_class
assert not cpu_class().exact, cpu_class()
import test_torch_int8 as tests
for rows in (1, 64):
    for inputs, outputs in ((10, 32), (4096, 48), (1023, 7)):
        tests.test_worst_case_linear(rows, inputs, outputs)
for shape, geometry in tests.GEOMETRIES:
    tests.test_worst_case_convolution(shape, geometry)
assert tests.worst_case((8, 8), "linear").weight_bits == 7
print("exact")
"""


def test_worst_case_without_vnni():
    result = subprocess.run(
        [sys.executable, "-c", CAPPED],
        env={
            **os.environ,
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "PYTHONPATH": os.path.dirname(__file__),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "exact", result.stderr[-2000:]


def random_layer(
    shape, kind="linear", bits=(8, 8), bias=True, steps=0, **geometry
):
    """A layer with an activation offset of so many scales."""
    module = (
        torch.nn.Linear(shape[1], shape[0])
        if kind == "linear"
        else torch.nn.Conv1d(
            shape[1] * geometry.get("groups", 1), shape[0], shape[2], **geometry
        )
    )
    if not bias:
        module.bias = None
    (layer,) = find_layers({"enc": module}, ["enc"])
    offset = steps * 2.5 / qmax(bits[1])
    layer = integer_layer(
        layer, LayerQuant(*bits, 2.5, activation_offset=offset)
    )
    return executed_integers({"": layer}, cpu_class())[""]


@torch.no_grad()
@pytest.mark.parametrize("bits", [(8, 8), (6, 6), (2, 2), (8, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_layers(bits, bias):
    linear = random_layer((48, 70), bits=bits, bias=bias)
    x = torch.randn(2, 3, 33, 70)
    for one in (x, x[0, 0, 0], x.double()):
        out = make_layer(linear)(one)
        assert out.dtype == torch.float32
        expected = reference_forward(linear, one.float())
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
    geometry = {"stride": 2, "padding": 3, "groups": 2}
    conv = random_layer((16, 8, 5), "conv1d", bits, bias, **geometry)
    x = torch.randn(2, 16, 33)
    out, expected = make_layer(conv)(x), reference_forward(conv, x)
    assert out.shape == expected.shape and out.dtype == torch.float32
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [1e-9, 0.03])
def test_few_rows_have_the_integers_of_many(bits, scale):
    linear = replace(
        random_layer((48, 64), bits=(8, bits), bias=False),
        activation_scale=torch.tensor([scale]),
    )
    # Between the points of the grid and far beyond its ends.
    x = torch.randn(24, 64) * scale * 100
    x[0, :2] = torch.tensor([1e6, -1e6])
    forward = make_layer(linear)
    few = torch.cat([forward(part) for part in x.split([1, 7, 16])])
    torch.testing.assert_close(few, forward(x), rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("bits, steps", [(8, 113), (8, -127), (6, 28), (2, 1)])
def test_layers_with_an_offset(bits, steps):
    linear = random_layer((48, 70), bits=(8, bits), steps=steps)
    assert linear.zero_point() == -steps
    middle = linear.activation_offset
    x = torch.randn(3, 33, 70) * 2 + middle
    for one in (x, x[:, 0]):
        out = make_layer(linear)(one)
        expected = reference_forward(linear, one)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
    conv = random_layer((16, 8, 5), "conv1d", (8, bits), steps=steps, stride=2)
    x = torch.randn(2, 8, 33) * 2 + middle
    out, expected = make_layer(conv)(x), reference_forward(conv, x)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_offsets_that_are_no_zero_point():
    layer = random_layer((4, 4), steps=3)
    step = layer.activation_offset
    for offset, padding in ((step * 0.9, 0), (step * 50, 0), (step, 1)):
        odd = replace(
            layer,
            activation_offset=offset,
            padding=padding,
        )
        with pytest.raises(ValueError, match="enc: an activation offset"):
            make_layer(odd)


@pytest.mark.parametrize("bits", [8, 6, 2])
@pytest.mark.parametrize("scale", [1e-10, 3e-5, 0.03, 7.0])
@pytest.mark.parametrize("dropped", [False, True])
def test_quantizing_is_that_of_the_simulation(
    bits, scale, dropped, monkeypatch
):
    if dropped:  # as torch says it will be
        monkeypatch.delattr(torch, "quantize_per_tensor", raising=False)
    x = torch.randn(1000, 33) * 60 * scale
    x[::3] = (torch.randint(-200, 200, x[::3].shape) + 0.5) * scale  # ties
    x[5] = torch.tensor([3e4, -3e4, 0.0]).repeat(11)
    q = Grid(float(torch.tensor(scale)), bits).prepare(x)
    expected = quantize(x, torch.tensor(scale), bits)
    assert torch.equal(q.int() - ZERO, expected.int())
    out = torch.zeros_like(q)
    Grid(float(torch.tensor(scale)), bits).prepare(x, out)
    assert torch.equal(out, q)
    # The zero point is added behind the rounding.
    inverse = 1.0 / torch.tensor(scale)
    for zero in (-qmax(bits), qmax(bits)):
        q = Grid(float(torch.tensor(scale)), bits, ZERO + zero).prepare(x)
        moved = (torch.round(x * inverse) + zero).clamp(-qmax(bits), qmax(bits))
        assert torch.equal(q.float() - ZERO, moved)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 5])
def test_what_follows_a_product(bits):
    layer = random_layer((48, 70))
    product = make_linear(layer, torch.float32)
    x = torch.randn(40, 70) * 2
    rows, y = product.form.prepare(x), reference_forward(layer, x)
    total = torch.randn(40, 48)
    added = product.add_(rows, total.clone())
    assert torch.allclose(added, total + y, atol=1e-5)
    floats = product.gelu(rows, Floats(torch.float32))
    assert torch.allclose(floats, F.gelu(y), atol=1e-5)
    gain, shift = torch.randn(48), torch.randn(48)
    moved = product.gelu(rows, Floats(torch.float32), (gain, shift))
    centered = (y - layer.bias) * gain + shift
    assert torch.allclose(moved, F.gelu(centered), atol=1e-5)
    # The smallest GELU, -0.17, lies outside of this grid, too.
    grid = Grid(float(torch.tensor(0.001)), bits)
    q = product.gelu(rows, grid).int() - ZERO
    expected = quantize(F.gelu(y), torch.tensor(grid.scale), bits).int()
    assert (q - expected).abs().max() <= 1
    assert (q != expected).float().mean() < 0.01
    assert q.min() == expected.min() and q.max() == expected.max()
    # With an offset it does or does not.
    for steps in (qmax(bits), qmax(bits) - 2):
        grid = Grid(float(torch.tensor(0.1)), bits, ZERO - steps)
        q = product.gelu(rows, grid).int() - ZERO
        moved = F.gelu(y) - steps * grid.scale
        expected = quantize(moved, torch.tensor(grid.scale), bits).int()
        assert (q - expected).abs().max() <= 1
        assert (q != expected).float().mean() < 0.01
        assert q.min() == expected.min() and q.max() == expected.max()


def test_few_numbers_of_rows():
    """What memory is bounded by, and what the bound costs."""
    rows = range(1, 1500)  # up to 30 s
    assert all(n <= padded_rows(n) < n + max(8, n / 16) for n in rows)
    assert len({padded_rows(n) for n in rows}) == 72


@torch.no_grad()
def test_attention_of_packed_utterances():
    lengths, heads, channels = [7, 1, 12], 4, 32
    qkv = torch.randn(20, 3 * channels)
    out = attend(qkv, lengths, heads)
    start = 0
    for n in lengths:
        part = qkv[start : start + n].view(n, 3, heads, -1).permute(1, 2, 0, 3)
        expected = F.scaled_dot_product_attention(*part, scale=1.0)
        expected = expected.transpose(0, 1).flatten(1)
        assert torch.allclose(out[start : start + n], expected, atol=1e-6)
        start += n


@torch.no_grad()
@pytest.mark.parametrize("backend", ["torch_int8", "openvino", "torch"])
@pytest.mark.parametrize("cpu", ["avx2", "avx512_vnni"])
def test_weights_still_in_their_file(tiny_model, backend, cpu):
    """Each is read when it is taken in, and the result is the same."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    integers = {
        x.name: integer_layer(x, LayerQuant(8, 8, 3.0))
        for x in find_layers({"w": tiny_model}, ["w"])
    }
    reads = []

    def stored(layer):
        def read():
            reads.append(layer.name)
            return layer.weight

        return replace(layer, weight=layer.weight.to("meta"), read=read)

    def run(layers):
        forwards = build_forwards(
            backend, {"w": tiny_model}, layers, CpuClass(cpu, False)
        )
        with shadowed_forwards(forwards):
            return tiny_model(waves()[:, :1500]).last_hidden_state

    expected = run(integers)
    out = run({name: stored(layer) for name, layer in integers.items()})
    assert torch.equal(out, expected)
    assert set(reads) == set(integers)


def test_weights_are_held_once(make_tiny_model):
    """Packed int8 weights alone: neither floats nor the spec's integers."""
    spec = describe(make_tiny_model("hubert-large"), (8, 8))
    execute = TorchInt8Executor(spec)
    held = set()

    def visit(value, depth=0):
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided:
                held.add(value.data_ptr())
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item, depth + 1)
        elif hasattr(value, "__dict__") and depth < 8:
            for item in vars(value).values():
                visit(item, depth + 1)

    visit(execute)
    assert held
    for layer in spec.layers():
        assert layer.weight.data_ptr() not in held, layer.name


@torch.no_grad()
def test_in_the_place_of_the_modules(make_tiny_modules):
    modules = make_tiny_modules("wav2vec2-large")
    target = ["wav2vec2", "enc", "ctc_lin"]
    integers = {
        x.name: integer_layer(x, LayerQuant(8, 8, 3.0))
        for x in find_layers(modules, target)
    }

    def run(backend):
        forwards = build_forwards(backend, modules, integers)
        with shadowed_forwards(forwards):
            hidden = modules["wav2vec2"](waves(), LENGTHS / 4000)
            return modules["ctc_lin"](modules["enc"](hidden))

    out, expected = run("torch_int8"), run("torch")
    spec = describe_encoder(modules["wav2vec2"].model, "wav2vec2.model", {})
    # Also the last CPU class, whose weights have 7 bits.
    assert errors(spec, out, expected, LENGTHS).square().mean().sqrt() < 0.05


@torch.no_grad()
def test_the_recipes_autocast_does_not_reach_it(make_tiny_modules):
    """Layers that the plan leaves in floating point stay what they are."""
    modules = make_tiny_modules("wav2vec2-large")
    layers = find_layers(modules, ["wav2vec2"], exclude=["*conv_layers*"])
    integers = {x.name: integer_layer(x, LayerQuant(8, 8, 3.0)) for x in layers}
    forwards = build_forwards("torch_int8", modules, integers)
    outputs = []
    for enabled in (False, True):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        with shadowed_forwards(forwards), autocast:
            outputs.append(modules["wav2vec2"](waves(), LENGTHS / 4000))
    assert torch.equal(*outputs)


def test_shared_input_without_some_biases():
    layers = [random_layer((8, 16), bias=b) for b in (True, False)]
    rows = [rows_of(layer, torch.float32) for layer in layers]
    shared = SharedInput(rows)
    assert len(shared.products) == 1
    x = torch.randn(5, 16)
    expected = torch.cat([reference_forward(one, x) for one in layers], 1)
    out = shared(x, torch.float32)
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 6, 530])
@pytest.mark.parametrize(
    "stride,padding,bias", [(1, 8, True), (3, 0, False), (2, 3, True)]
)
def test_groups_by_products_are_the_convolution(frames, stride, padding, bias):
    layer = IntegerLayer(
        "w",
        "conv1d",
        torch.randint(-63, 64, (24, 5, 16), dtype=torch.int8),
        torch.rand(24) + 0.5,
        7,
        torch.tensor([0.25]),
        8,
        torch.randn(24) if bias else None,
        stride,
        padding,
        1,
        4,
    )
    conv = make_conv(layer, torch.float32)
    assert isinstance(conv, GroupedConv)
    inputs = (frames - 1) * stride + 16 - 2 * padding
    x = torch.randn(2, max(inputs, 1), 20) * 10
    expected = reference_forward(layer, x.transpose(1, 2)).transpose(1, 2)
    out = conv(conv.form.prepare(x), torch.float32)
    assert torch.allclose(out, expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("scale", [0.01, 0.001])
def test_lower_edge_of_a_gelu(bits, scale):
    """It is on a coarse grid of 8 bits without being cut, else it is cut."""
    layer = random_layer((16, 8))
    product = make_linear(layer, torch.float32)
    x = torch.linspace(-4, 4, 800).view(100, 8)
    rows = product.form.prepare(x)
    limit = 2 ** (bits - 1) - 1
    q = product.gelu(rows, Grid(scale, bits)).int() - ZERO
    assert q.min() == max(-limit, round(-0.17 / scale)) and q.max() == limit
    copied = torch.zeros(100, 16, dtype=torch.uint8)
    product.gelu(rows, Grid(scale, bits), out=copied)
    assert torch.equal(copied.int() - ZERO, q)


def test_convolution_that_stays_float():
    layer = FloatLayer(
        "w", "conv1d", torch.randn(8, 2, 4), torch.randn(8), 2, 1, 1, 2
    )
    conv = make_conv(layer, torch.float32)
    x = torch.randn(2, 4, 21)
    expected = F.conv1d(x, layer.weight, layer.bias, 2, 1, 1, 2)
    out = conv(conv.form.prepare(x.transpose(1, 2)), torch.float32)
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-6)
