"""The triton runtime on tiny models: plain torch here, interpreter elsewhere.

`test_cases.py` runs this file once more in Triton's interpreter; with a CUDA
device its kernels run on that.
"""

import os
from dataclasses import replace

import pytest
import torch
from tiny_layers import lopsided_integers

from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.core.integer_layer import (
    FloatLayer,
    IntegerLayer,
    float_layer,
    reference_forward,
)
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.model.encoders import find_encoders
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes.answer import Answer
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.runtimes.choice import choose_backend
from speechbrain_stablequant.runtimes.probe_make import quick_integers
from speechbrain_stablequant.runtimes.reference import ReferenceExecutor
from speechbrain_stablequant.runtimes.triton.build import (
    make_executor,
    make_layer,
    residual_dtype,
)
from speechbrain_stablequant.utils.patching import shadowed_forwards
from speechbrain_stablequant.utils.precision import full_float32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SAMPLES = 2000
#: In float32 the runtime differs from the reference by the order of its sums.
#: A value at a tie may become another integer, and a single one moves the
#: output of these tiny models by up to 2 %.
TIES = 0.04

#: What is decided on the host needs no slow kernels to be tested: each
#: operator is compared with its reference in ``cases``.
host_only = pytest.mark.skipif(
    INTERPRETED, reason="decisions of the host; this runs in plain torch"
)


@pytest.fixture(autouse=True)
def no_tf32():
    """As ``build_forwards`` has it; here executors are called by themselves."""
    with full_float32():
        yield


def quantized_layers(modules, keys, bits=8):
    """Integers of every layer: ranges of encoders are measured, inputs of
    heads are cut off at 3."""
    layers = find_layers(modules, keys)
    quant = LayerQuant(bits, bits, 3.0)
    found = {layer.name: integer_layer(layer, quant) for layer in layers}
    for encoder in find_encoders(modules):
        found |= quick_integers(encoder, layers, (bits, bits), 16000, "cpu")
    return found


def describe(model, keep=lambda name: True, bits=8):
    """The spec of a model with the layers that ``keep`` wants as integers."""
    integers = quantized_layers({"enc": model}, ["enc"], bits)
    kept = {n: layer for n, layer in integers.items() if keep(n)}
    return describe_encoder(model, "enc", kept)


def relative_error(found, expected):
    """Distance over the spread of what is expected."""
    found = found.cpu()
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    spread = (expected - expected.mean()).norm()
    return float((found - expected).norm() / spread)


def check_float32(spec, wavs):
    """Compares the runtime in float32 with the reference; its network."""
    execute = make_executor(spec, DEVICE, dtype="float32")
    expected = ReferenceExecutor(spec)(wavs)
    assert relative_error(execute(wavs.to(DEVICE), None), expected) < TIES
    return execute.network


def check_16_bit(spec, dtype):
    """The runtime differs from the reference by no more than a few times what
    the reference does when its input moves by a rounding of 16 bit."""
    wavs = torch.randn(2, SAMPLES)
    expected = ReferenceExecutor(spec)(wavs)
    moved = ReferenceExecutor(spec)(wavs * (1 + 2**-9))
    found = make_executor(spec, DEVICE, dtype=dtype)(wavs.to(DEVICE), None)
    # bfloat16 rounds the residual stream to 2^-9 some ten times
    limit = max(4 * relative_error(moved, expected), 0.03)
    assert relative_error(found, expected) < limit


@pytest.mark.parametrize(
    "bits",
    [8, pytest.param(6, marks=host_only), pytest.param(4, marks=host_only)],
)
def test_agrees_with_the_reference(tiny_model, bits):
    check_float32(describe(tiny_model, bits=bits), torch.randn(2, SAMPLES))


def describe_lopsided(model, quants):
    """An encoder with activation offsets and, where it can be, rotated."""
    return describe_encoder(model, "w", lopsided_integers(model, quants))


@pytest.mark.parametrize(
    "variant, bits",
    [
        pytest.param("wav2vec2-base", (8, 8), marks=host_only),
        ("hubert-large", (8, 6)),
    ],
)
def test_offsets_and_rotation(tiny_model, lopsided_quants, bits):
    spec = describe_lopsided(tiny_model, lopsided_quants(tiny_model, bits))
    assert {x.zero_point() for x in spec.blocks[0].layers()} > {0}
    check_float32(spec, torch.randn(1, 1200))


@host_only
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["wav2vec2-base", "hubert-large"])
def test_offsets_and_rotation_in_16_bit(tiny_model, lopsided_quants, dtype):
    quants = lopsided_quants(tiny_model)
    check_16_bit(describe_lopsided(tiny_model, quants), dtype)


@host_only
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_agrees_within_16_bit(tiny_model, dtype):
    check_16_bit(describe(tiny_model), dtype)


def test_masks_the_padding(tiny_model):
    """Real frames of a padded batch are those of the reference with a mask."""
    spec = describe(tiny_model)
    wavs = torch.randn(3, SAMPLES)
    lengths = torch.tensor([SAMPLES, 1500, 450])
    for row, length in zip(wavs, lengths, strict=True):
        row[length:] = 0
    execute = make_executor(spec, DEVICE, dtype="float32")
    found = execute(wavs.to(DEVICE), lengths.to(DEVICE)).cpu()
    expected = ReferenceExecutor(spec)(wavs, lengths)
    for i, length in enumerate(lengths):
        frames = spec.frames(int(length))
        assert frames > 0
        error = relative_error(found[i, :frames], expected[i, :frames])
        assert error < TIES


@host_only
def test_an_utterance_without_a_frame_is_finite(make_tiny_model):
    spec = describe(make_tiny_model("hubert-large"))
    execute = make_executor(spec, DEVICE)
    wavs = torch.randn(2, SAMPLES).to(DEVICE)
    found = execute(wavs, torch.tensor([SAMPLES, 3]).to(DEVICE))
    assert found.isfinite().all()


@host_only
@pytest.mark.parametrize("samples", [400, 719, 720, 2999, 3333])
def test_the_bucket_does_not_matter(tiny_model, samples):
    """Every length, also those that a GroupNorm over the padding would get
    wrong, equals the reference, which pads nothing."""
    spec = describe(tiny_model)
    check_float32(spec, torch.randn(1, samples))


MIXED = {
    "no conv": lambda name: "conv_layers" not in name,
    "first conv float": lambda name: "conv_layers.0." not in name,
    "third conv float": lambda name: "conv_layers.2." not in name,
    "only conv": lambda name: "conv_layers" in name,
    "no projection": lambda name: "projection" not in name,
    "no position": lambda name: "pos_conv" not in name,
    "no key": lambda name: "k_proj" not in name,
    "no up": lambda name: "intermediate_dense" not in name,
    "no down": lambda name: "output_dense" not in name,
    "no out": lambda name: "out_proj" not in name,
    "nothing": lambda name: False,
}


#: Base models differ in their convolutions, and by their residual stream.
BASE = ("no conv", "first conv float", "only conv", "no key", "no up")


@host_only
@pytest.mark.parametrize(
    ("variant", "name"),
    [("hubert-large", x) for x in MIXED] + [("wav2vec2-base", x) for x in BASE],
)
def test_any_layer_may_stay_float(make_tiny_model, variant, name):
    keep = MIXED[name]
    spec = describe(make_tiny_model(variant), keep)
    kinds = {type(layer) for layer in spec.layers()}
    assert FloatLayer in kinds
    check_float32(spec, torch.randn(2, 1500))


@host_only
@pytest.mark.parametrize(
    ("peak", "dtype"),
    [(None, "bfloat16"), (2.0**14, "float16"), (1e5, "bfloat16")],
)
def test_a_residual_that_float16_does_not_hold(make_tiny_model, peak, dtype):
    """In float16 it is lost, which a probe refuses; by the record of the
    calibration, or without one, it is not computed so."""
    spec = describe(make_tiny_model("hubert-large"))
    block = spec.blocks[0]
    high = torch.zeros(len(block.down.weight))
    high[3] = 1e5
    blocks = (replace(block, down=replace(block.down, bias=high)),)
    spec = replace(spec, blocks=blocks, residual_amax=peak)
    wavs = torch.randn(1, 1200).to(DEVICE)
    expected = ReferenceExecutor(spec)(wavs.cpu())[0]
    answer = Answer.measured(expected, [[expected]])
    found = make_executor(spec, DEVICE)(wavs)[0].cpu()
    assert residual_dtype(spec, "auto") == getattr(torch, dtype)
    assert bool(found.isfinite().all()) == (dtype == "bfloat16")
    if dtype == "float16":
        assert answer.compare(found).text == "is not finite"


@host_only
def test_projections_on_scales_of_their_own(make_tiny_model):
    """Query, key and value with different scales are three products."""
    spec = describe(make_tiny_model("hubert-large"))
    block = spec.blocks[0]
    key = replace(block.key, activation_scale=block.key.activation_scale * 0.9)
    spec = replace(spec, blocks=(replace(block, key=key), *spec.blocks[1:]))
    network = check_float32(spec, torch.randn(1, 1500))
    assert [len(block.qkv.parts) for block in network.blocks] == [3, 1]


@host_only
def test_wide_norms_are_computed_apart(make_tiny_model):
    """More channels than one tile holds: LayerNorm by its own kernel."""
    model = make_tiny_model(
        "hubert-large", conv_dim=(16, 520), conv_kernel=(10, 3),
        conv_stride=(5, 2),
    )  # fmt: skip
    network = check_float32(describe(model), torch.randn(1, 300))
    assert [stage.fused for stage in network.stages] == [True, False]


@host_only
def test_wide_norms_before_an_offset(make_tiny_model, lopsided_quants):
    """The kernel that writes the moved integers is that of the norm."""
    model = make_tiny_model(
        "hubert-large", conv_dim=(16, 520, 16), conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
    )  # fmt: skip
    spec = describe_lopsided(model, lopsided_quants(model))
    assert spec.convs[2].conv.zero_point() < 0
    check_float32(spec, torch.randn(1, 300))


def _layer(kind="linear", **changes) -> IntegerLayer:
    module = (
        torch.nn.Linear(20, 7)
        if kind == "linear"
        else torch.nn.Conv1d(20, 7, 3, stride=2)
    )
    plain = float_layer("ctc_lin.w", module)
    weight = torch.randint(-127, 128, plain.weight.shape, dtype=torch.int8)
    layer = IntegerLayer(
        "ctc_lin.w", kind, weight, torch.rand(7) * 0.01, 8,
        torch.tensor(0.02), 8, plain.bias, plain.stride,
    )  # fmt: skip
    return replace(layer, **changes)


@pytest.mark.parametrize("steps", [0, 100])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_head(has_bias, steps):
    layer = _layer(activation_offset=steps * 0.02)
    layer = layer if has_bias else replace(layer, bias=None)
    x = torch.randn(2, 5, 20)
    found = make_layer(layer, DEVICE)(x.to(DEVICE)).cpu()
    torch.testing.assert_close(found, reference_forward(layer, x))


def test_a_convolution_outside_the_encoder():
    layer = _layer("conv1d")
    x = torch.randn(2, 20, 9)
    found = make_layer(layer, DEVICE)(x.to(DEVICE)).cpu()
    torch.testing.assert_close(found, reference_forward(layer, x))


def test_errors_say_what_to_do(make_tiny_model, monkeypatch):
    with pytest.raises(ValueError, match=r"ctc_lin.w: .* padding 1, dilat"):
        make_layer(_layer("conv1d", padding=1), DEVICE)
    spec = describe(make_tiny_model("hubert-large"))
    first = spec.convs[0]
    moved = replace(
        first.conv, activation_offset=float(first.conv.activation_scale)
    )
    odd = replace(spec, convs=(replace(first, conv=moved), *spec.convs[1:]))
    with pytest.raises(ValueError, match=r"conv_layers.0.conv: .*a waveform"):
        make_executor(odd, DEVICE)
    long = first.conv.weight.new_zeros(16, 1, 200)
    odd = replace(
        spec,
        convs=(
            replace(first, conv=replace(first.conv, weight=long)),
            *spec.convs[1:],
        ),
    )
    with pytest.raises(ValueError, match=r"conv_layers.0.conv: .* 128 taps"):
        make_executor(odd, DEVICE)
    norm = replace(spec.convs[1].norm, over_time=True)
    odd = replace(spec, convs=(first, replace(spec.convs[1], norm=norm)))
    with pytest.raises(ValueError, match=r"layers.1.conv: .* for GroupNorm"):
        make_executor(odd, DEVICE)
    execute = make_executor(spec, DEVICE)
    with pytest.raises(ValueError, match="100 samples is too short"):
        execute(torch.zeros(1, 100, device=DEVICE), None)
    with pytest.raises(ValueError, match=f"the encoder is on {DEVICE}"):
        execute(torch.zeros(1, 1000, device="meta"), None)


def test_a_card_that_is_too_old_is_named(pretended_card, caplog):
    """Explicitly: an error. By ``auto``: simulation, and why."""
    pretended_card("an old card", (7, 5))
    old = "an old card has compute capability 7.5, 8.0 or more is needed"
    with pytest.raises(ValueError, match=old):
        choose_backend("triton", "cuda")
    with pytest.raises(ValueError, match=old):
        make_layer(_layer(), "cuda")
    assert choose_backend("auto", "cuda")[0] == "torch"
    assert "quantization is simulated" in caplog.text
    assert old in caplog.text


@pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="heads run on a CUDA device or in the interpreter",
)
@pytest.mark.parametrize("variant", ["wav2vec2-base", "hubert-large"])
def test_in_the_place_of_a_brains_modules(make_tiny_modules, variant):
    """Encoder and heads as a Brain or an EncoderASR runs them: the Hugging
    Face model called with a mask, then the layers of the heads."""
    modules = make_tiny_modules(variant)
    wavs, mask = torch.randn(2, 1200), torch.ones(2, 1200, dtype=torch.long)
    mask[1, 900:] = 0
    wavs = wavs * mask

    keys = ["wav2vec2", "enc", "ctc_lin"]
    integers = quantized_layers(modules, keys)
    spec = describe_encoder(
        modules["wav2vec2"].model, "wav2vec2.model", integers
    )
    hidden = ReferenceExecutor(spec)(wavs, mask.sum(1))
    frames = [spec.frames(1200), spec.frames(900)]
    heads = {n: la for n, la in integers.items() if "wav2vec2" not in n}
    with shadowed_forwards(build_forwards("torch", modules, heads)):
        expected = modules["ctc_lin"](modules["enc"](hidden))

    modules = modules.to(DEVICE)
    forwards = build_forwards(
        "triton", modules, integers, dtype="float32", tune=False
    )
    with shadowed_forwards(forwards), torch.no_grad():
        model = modules["wav2vec2"].model
        hidden = model(wavs.to(DEVICE), attention_mask=mask.to(DEVICE))
        found = modules["ctc_lin"](modules["enc"](hidden.last_hidden_state))
    for i, count in enumerate(frames):
        error = relative_error(found[i, :count], expected[i, :count])
        assert error < TIES
    assert modules["wav2vec2"].model.forward not in forwards.values()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a CUDA device")
def test_without_a_device_it_is_refused(make_tiny_model, monkeypatch):
    from speechbrain_stablequant.runtimes.triton.kernels import library

    monkeypatch.setattr(library, "INTERPRETED", False)
    spec = describe(make_tiny_model("hubert-large"))
    with pytest.raises(ValueError, match="no CUDA device; write backend: au"):
        make_executor(spec)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("limit", [1, 2])
def test_graphs_equal_launches(
    tiny_model, lopsided_quants, limit
):  # pragma: no cover
    spec = describe_lopsided(tiny_model, lopsided_quants(tiny_model))
    plain = make_executor(spec, max_graphs=0, tune=False)
    graphs = make_executor(spec, max_graphs=limit, tune=False)
    for samples in (3333, 1500, 700, 3333, 1500, 700, 3333, 1500):
        wavs = torch.randn(2, samples, device=DEVICE)
        expected = plain(wavs, None)
        assert torch.equal(graphs(wavs, None), expected)
    assert len(graphs.graphs.cache.graphs) == limit


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_graphs_made_in_inference_mode_serve_outside(
    make_tiny_model, tmp_path
):  # pragma: no cover
    spec = describe(make_tiny_model("wav2vec2-base"))
    execute = make_executor(spec, cache=tmp_path / "tiles.json")
    wavs = torch.randn(2, SAMPLES, device=DEVICE)
    with torch.inference_mode():
        first = [execute(wavs, None) for _ in range(2)]
    with torch.no_grad():
        first.append(execute(wavs, None))
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])
    assert (tmp_path / "tiles.json").exists()
