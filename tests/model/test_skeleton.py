"""Encoders without transformers' code: the same parameters and settings."""

import pytest
import torch
from torch import nn

from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder.encoder_config import empty_encoder
from speechbrain_stablequant.folder.recognizer import RuntimeEncoder
from speechbrain_stablequant.folder.stored_floats import fill_modules
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.model.skeleton import (
    empty_skeleton,
    folded_norms,
    has_skeleton,
)
from speechbrain_stablequant.model.wrapper import StoredEncoder
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.runtimes.forwards import EncoderOutput

CHANGES = [
    {},
    {"mask_time_prob": 0.1},
    {"num_conv_pos_embeddings": 15},
    {"conv_bias": True, "do_stable_layer_norm": True},
    {"feat_extract_norm": "layer", "layer_norm_eps": 1e-3},
]


def plain(model) -> dict:
    """Content of the ``config.json`` of a model."""
    return {**model.config.to_dict(), "model_type": model.config.model_type}


@pytest.mark.parametrize("changes", CHANGES)
def test_parameters_are_those_of_transformers(
    variant, make_tiny_model, changes
):
    config = plain(make_tiny_model(variant, **changes))
    assert has_skeleton(config)
    shell, model = empty_skeleton(config), empty_encoder(config)
    assert all(p.is_meta for p in shell.parameters())
    expected = {n: torch.empty(t.shape) for n, t in model.state_dict().items()}
    expected = folded_norms(expected)
    found = shell.state_dict()
    assert {n: t.shape for n, t in found.items()} == {
        n: t.shape for n, t in expected.items()
    }


def test_hubert_without_projection_norm(make_tiny_model):
    config = plain(make_tiny_model("hubert-base", feat_proj_layer_norm=False))
    names = set(empty_skeleton(config).state_dict())
    assert "feature_projection.layer_norm.weight" not in names
    assert names == set(folded_norms(empty_encoder(config).state_dict()))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "relu"},
        {"feat_extract_activation": "gelu_new"},
        {"add_adapter": True},
        {"adapter_attn_dim": 4},
        {"feat_extract_norm": "batch"},
        {"model_type": "wavlm"},
        {"conv_pos_batch_norm": True},
    ],
)
def test_other_models_have_no_shell(make_tiny_model, changes):
    config = plain(make_tiny_model("wav2vec2-large"))
    assert has_skeleton(config)
    assert not has_skeleton({**config, **changes})
    for key in ("hidden_act", "conv_dim"):
        assert not has_skeleton({k: v for k, v in config.items() if k != key})


@torch.no_grad()
def test_runtime_computes_the_same_from_a_shell(tiny_model):
    """Also where the plan leaves the convolution with weight norm float."""
    quants = {
        x.name: x
        for x in find_layers({"w": tiny_model}, ["w"])
        if "pos_conv" not in x.name and "layers.1" not in x.name
    }
    integers = {
        n: integer_layer(x, LayerQuant(8, 8, 3.0)) for n, x in quants.items()
    }
    shell = empty_skeleton(plain(tiny_model))
    floats = {
        f"w.{n}": t.clone()
        for n, t in tiny_model.state_dict().items()
        if f"w.{n}".removesuffix(".weight") not in integers
    }
    fill_modules({"w": shell}, integers, folded_norms(floats), "here")
    wavs = torch.randn(2, 3000)
    mask = torch.arange(3000)[None] < torch.tensor([[3000], [2000]])
    (one,) = build_forwards("torch_int8", {"w": tiny_model}, integers).values()
    (two,) = build_forwards("torch_int8", {"w": shell}, integers).values()
    expected = one(wavs, attention_mask=mask).last_hidden_state
    out = two(wavs, attention_mask=mask).last_hidden_state
    assert torch.equal(out, expected)


def test_folded_norm_is_the_weight_of_the_model(tiny_model):
    conv = tiny_model.encoder.pos_conv_embed.conv
    folded = folded_norms(conv.state_dict(prefix="conv."))
    assert set(folded) == {"conv.weight", "conv.bias"}
    assert torch.equal(folded["conv.weight"], conv.weight)


class Mirror(nn.Module):
    """Gives its input, and zeros where the mask is."""

    def forward(self, wav, attention_mask=None, output_hidden_states=False):
        assert output_hidden_states is False
        if attention_mask is not None:
            wav = wav * attention_mask
        return EncoderOutput(wav[:, :, None].repeat(1, 1, 3))


@pytest.mark.parametrize("lengths", [None, [1.0, 0.57]])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("output_norm", [False, True])
def test_wrapper_computes_what_speechbrains_does(
    normalize, output_norm, lengths
):
    lengths = None if lengths is None else torch.tensor(lengths)
    wavs = torch.randn(2, 70) + 0.3
    wrapper, expected = (
        kind(Mirror(), normalize, output_norm)
        for kind in (RuntimeEncoder, StoredEncoder)
    )
    assert torch.equal(wrapper(wavs, lengths), expected(wavs, lengths))
