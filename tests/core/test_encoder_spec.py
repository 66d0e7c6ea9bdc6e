"""What the integer runtimes do not compute: one line that names it."""

from types import SimpleNamespace

import pytest
import torch
from speechbrain.nnet.adapters import AdaptedModel, HoulsbyAdapterLinear, LoRA
from torch import nn
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
)

from speechbrain_stablequant.core.encoder_spec import (
    check_encoders,
    describe_encoder,
)
from speechbrain_stablequant.model.layers import find_layers

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 4),
    "conv_stride": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def wrapped(model: nn.Module) -> nn.Module:
    """A model where recipes have it."""
    wrapper = nn.Module()
    wrapper.model = model
    return wrapper


def reason(module: nn.Module) -> str:
    """Why the integer runtimes refuse a module: one line."""
    with pytest.raises(ValueError) as caught:
        check_encoders({"wav2vec2": module})
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("backend: ")
    assert text.endswith("backend: torch")
    return text


@pytest.mark.parametrize(
    ("adapter", "options"),
    [(LoRA, {"rank": 2}), (HoulsbyAdapterLinear, {"projection_size": 4})],
)
@pytest.mark.parametrize("inside", [False, True])
def test_adapters(adapter, options, inside, make_tiny_model):
    """SpeechBrain's take the place of layers, in the wrapper or the model."""
    model, name = make_tiny_model("wav2vec2-large"), adapter.__name__
    how = {"target_layers": ["*.q_proj"], "adapter_kwargs": options}
    if inside:
        module = wrapped(AdaptedModel(model, adapter, **how))
        place = "wav2vec2.model.adapted_model"
    else:
        module = AdaptedModel(wrapped(model), adapter, **how)
        place = "wav2vec2.adapted_model.model"
    said = f"backend: {place}.encoder.layers.0.attention.q_proj: {name} is not"
    assert reason(module).startswith(said)


def test_another_module_in_the_place_of_a_convolution(make_tiny_model):
    model = make_tiny_model("hubert-base")
    stage = model.feature_extractor.conv_layers[3]
    stage.conv = nn.Sequential(stage.conv)
    text = reason(wrapped(model))
    assert "conv_layers.3.conv: Sequential is not supported" in text
    assert "only a plain Conv1d" in text


def test_data2vec():
    settings = {**SMALL, "num_conv_pos_embeddings": 2}
    model = Data2VecAudioModel(Data2VecAudioConfig(**settings))
    text = reason(wrapped(model))
    assert "wav2vec2.model: Data2VecAudioModel ('Data2Vec" in text


def test_conformer():
    model = Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**SMALL))
    assert "wav2vec2.model: Wav2Vec2ConformerModel" in reason(wrapped(model))
    # Its positional convolution is made and never called.
    names = [x.name for x in find_layers({"w": wrapped(model)}, ["w"])]
    assert not any("pos_conv" in name for name in names)
    called = set()
    for name, module in model.named_modules(prefix="w.model"):
        module.register_forward_hook(lambda *_, n=name: called.add(n))
    with torch.no_grad():
        model(torch.randn(1, 4000))
    assert set(names) <= called


@pytest.mark.parametrize(
    "switch", ["output_hidden_states", "output_all_hiddens"]
)
def test_all_hidden_states(switch, make_tiny_model):
    """A recipe asks the wrapper, WeightedSSLModel the configuration."""
    encoder = wrapped(make_tiny_model("hubert-large"))
    config = encoder.model.config
    setattr(config if hasattr(config, switch) else encoder, switch, True)
    assert f"and {switch} of 'wav2vec2' asks for all" in reason(encoder)


def test_an_approximate_gelu(make_tiny_model):
    model = make_tiny_model("wav2vec2-base")
    feed = model.encoder.layers[1].feed_forward
    feed.intermediate_act_fn = nn.GELU("tanh")
    assert "activation GELU (tanh) is not supported" in reason(wrapped(model))
    feed.intermediate_act_fn = nn.GELU()
    check_encoders({"wav2vec2": wrapped(model)})


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (nn.RMSNorm(32), "RMSNorm is not supported"),
        (nn.LayerNorm(32, bias=False), "without weight and bias"),
        (nn.LayerNorm(32, elementwise_affine=False), "without weight and bi"),
    ],
)
def test_other_norms(norm, said, make_tiny_model):
    model = make_tiny_model("wav2vec2-base")
    model.encoder.layers[0].final_layer_norm = norm
    text = reason(wrapped(model))
    assert "wav2vec2.model.encoder.layers.0.final_layer_norm: " in text
    assert said in text


def test_a_linear_with_a_forward_of_its_own(make_tiny_model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make_tiny_model("wav2vec2-base")
    model.feature_projection.projection = Doubled(16, 32)
    assert "feature_projection.projection: Doubled" in reason(wrapped(model))


def test_parametrized_layers_are_plain(tiny_model):
    """Weight norm makes a class of its own, which computes the same."""
    conv = tiny_model.encoder.pos_conv_embed.conv
    assert type(conv) is not nn.Conv1d
    assert describe_encoder(tiny_model, "w", {}).pos_conv.kind == "conv1d"


def test_a_model_without_a_configuration(make_tiny_model):
    model = make_tiny_model("wav2vec2-base")
    model.config = SimpleNamespace(num_attention_heads=2)
    with torch.no_grad():
        assert "'do_stable_layer_norm'" in reason(wrapped(model))
