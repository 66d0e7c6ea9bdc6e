"""The description of an encoder, and its exact execution."""

import pytest
import torch

from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.model.rotation import (
    attach_rotation,
    random_rotation,
)
from speechbrain_stablequant.runtimes.forwards import encoder_forward
from speechbrain_stablequant.runtimes.reference import ReferenceExecutor
from speechbrain_stablequant.simulation.fake_quant import Simulator
from speechbrain_stablequant.utils.patching import shadowed_forwards

LENGTHS = torch.tensor([4000, 2500])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two utterances, and the mask of their samples."""
    torch.manual_seed(1)
    mask = torch.arange(4000)[None] < LENGTHS[:, None]
    return torch.randn(2, 4000) * mask, mask


def real_rows(spec, hidden):
    """The frames of each utterance that see no padding alone."""
    return [
        row[: spec.frames(int(n))]
        for row, n in zip(hidden, LENGTHS, strict=True)
    ]


def assert_same(spec, out, expected, tolerance):
    for one, other in zip(
        real_rows(spec, out), real_rows(spec, expected), strict=True
    ):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@torch.no_grad()
def test_float_description_is_the_model(tiny_model):
    model, (wavs, mask) = tiny_model, batch()
    spec = describe_encoder(model, "w", {})
    expected = model(wavs, attention_mask=mask).last_hidden_state
    out = ReferenceExecutor(spec)(wavs, LENGTHS)
    assert out.shape[1] == spec.frames(4000)
    assert_same(spec, out, expected, 1e-5)
    alone = model(wavs[:1]).last_hidden_state
    out = ReferenceExecutor(spec)(wavs[:1], None)
    assert (out - alone).abs().max() <= 1e-5 * alone.abs().max()


@torch.no_grad()
def test_integers_are_the_simulation(tiny_model):
    model, (wavs, mask) = tiny_model, batch()
    layers = find_layers({"w": model}, ["w"])
    # One layer stays float, as a plan may say.
    quants = {x.name: LayerQuant(8, 8, 6.0) for x in layers[:-1]}
    with Simulator(layers).apply(quants):
        expected = model(wavs, attention_mask=mask).last_hidden_state
    integers = {
        x.name: integer_layer(x, quants[x.name])
        for x in layers
        if x.name in quants
    }
    spec = describe_encoder(model, "w", integers)
    assert {x.name for x in spec.layers()} == {x.name for x in layers}
    # A value at a tie may round the other way, so not to float rounding.
    out = ReferenceExecutor(spec)(wavs, LENGTHS)
    assert_same(spec, out, expected, 0.02)


def simulated(model, quants):
    """The description of a quantized model, and what its simulation gives."""
    wavs, mask = batch()
    layers = find_layers({"w": model}, ["w"])
    with Simulator(layers).apply(quants):
        expected = model(wavs, attention_mask=mask).last_hidden_state
    integers = {x.name: integer_layer(x, quants[x.name]) for x in layers}
    return describe_encoder(model, "w", integers), expected


@torch.no_grad()
@pytest.mark.parametrize(
    "variant, bits", [("wav2vec2-base", (8, 8)), ("hubert-large", (8, 4))]
)
def test_offsets_are_the_simulation(tiny_model, lopsided_quants, bits):
    quants = lopsided_quants(tiny_model, bits)
    spec, expected = simulated(tiny_model, quants)
    moved = [x for x in spec.layers() if x.zero_point()]
    assert len(moved) == len(spec.convs) - 1 + len(spec.blocks)
    out = ReferenceExecutor(spec)(batch()[0], LENGTHS)
    assert_same(spec, out, expected, 0.02)


@torch.no_grad()
def test_rotation_is_the_simulation(make_tiny_model):
    model, wavs = make_tiny_model("wav2vec2-large"), batch()[0]
    plain = ReferenceExecutor(describe_encoder(model, "w", {}))(wavs, LENGTHS)
    attach_rotation(model.encoder, random_rotation(32))
    layers = find_layers({"w": model}, ["w"])
    quants = {x.name: LayerQuant(8, 8, 6.0) for x in layers}
    spec, expected = simulated(model, quants)
    out = ReferenceExecutor(spec)(wavs, LENGTHS)
    assert_same(spec, out, expected, 0.02)
    assert (out - plain).abs().max() > 0.1 * plain.abs().max()


def test_rotation_between_other_norms_is_refused(make_tiny_model):
    model = make_tiny_model("hubert-base")
    attach_rotation(model.encoder, random_rotation(32))
    with pytest.raises(ValueError, match=r"w.encoder: .*do_stable_layer_norm"):
        describe_encoder(model, "w", {})


@torch.no_grad()
def test_shadowed_model_gives_what_was_executed(tiny_model):
    model, (wavs, mask) = tiny_model, batch()
    execute = ReferenceExecutor(describe_encoder(model, "w", {}))
    before = model(wavs, attention_mask=mask).last_hidden_state
    calls = []

    def counted(wavs, lengths):
        calls.append(lengths.tolist())
        return execute(wavs, lengths) + 1

    with shadowed_forwards({model: encoder_forward(counted)}):
        out = model(wavs, attention_mask=mask).last_hidden_state
        with pytest.raises(ValueError, match="output_all_hiddens"):
            model(wavs, output_hidden_states=True)
    assert calls == [LENGTHS.tolist()]
    assert (out[0] - 1 - before[0]).abs().max() < 1e-4
    after = model(wavs, attention_mask=mask).last_hidden_state
    assert torch.equal(before, after)


@pytest.mark.parametrize("part", ["pos_conv_embed", "layers.0.feed_forward"])
def test_other_activation_is_refused(part, make_tiny_model):
    model = make_tiny_model("wav2vec2-large")
    module = model.encoder.get_submodule(part)
    name = "activation" if "pos" in part else "intermediate_act_fn"
    setattr(module, name, torch.nn.ReLU())
    with pytest.raises(ValueError, match=r"activation ReLU.*backend: torch"):
        describe_encoder(model, "w", {})
