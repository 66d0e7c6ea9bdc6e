"""The runtime that a variant gets: chosen, and tried on one batch."""

from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from torch import nn

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.brain.run_runtime import (
    check_descriptions,
    choose_runtime,
    try_descriptions,
)
from speechbrain_stablequant.config import ConfigError
from speechbrain_stablequant.model.wrapper import StoredEncoder
from speechbrain_stablequant.runtimes import choice

CONFIG = QuantizeConfig.from_dict({"target": ["wav2vec2", "ctc_lin"]})
FAILURE = "operator linear fails: no (tried on a card); use backend: torch"

# -- chosen --------------------------------------------------------------------


def choose(device: str, **block):
    """The runtime of a Brain on a device, and what is to be said."""
    modules = nn.ModuleDict({"enc": nn.Linear(2, 2)})
    brain = SimpleNamespace(device=device, modules=modules)
    config = QuantizeConfig.from_dict({"target": ["enc"], **block})
    return choose_runtime(brain, config)


@pytest.fixture
def failing_card(monkeypatch):
    """A GPU whose kernels failed their trial."""
    monkeypatch.setattr(choice, "_why_not", lambda *_: FAILURE)


def test_a_card_that_fails_is_in_the_report(failing_card):
    said = "operator linear fails: no (tried on a card)."
    assert choose("cuda:0") == (
        "torch",
        [f"Evaluated by simulation: triton: {said}"],
    )


def test_a_card_that_fails_is_an_error_where_it_was_asked_for(failing_card):
    with pytest.raises(ConfigError, match=r"quantize\.backend: triton cannot"):
        choose("cuda:0", backend="triton")


def test_a_device_without_an_integer_runtime():
    name, warnings = choose(str(torch.device("meta")))
    assert name == "torch"
    assert warnings == [
        "Evaluated by simulation: no integer runtime for device meta."
    ]


def test_a_simulation_that_was_asked_for_needs_no_word():
    assert choose("cpu", backend="torch") == ("torch", [])


# -- descriptions of encoders, computed beside their modules -------------------


class Recognizer(sb.Brain):
    """An encoder and a linear layer."""

    def compute_forward(self, batch, stage):
        assert stage == sb.Stage.VALID
        return self.modules.ctc_lin(self.modules.wav2vec2(*batch.sig))


class Batch(SimpleNamespace):
    def to(self, device):
        return self


def batch():
    """The longest utterance is the second one."""
    lengths = torch.tensor([0.7, 1.0])
    wavs = torch.randn(2, 4000)
    wavs[0, 2800:] = 0
    return Batch(sig=(wavs, lengths))


def make_brain(model, kind=Recognizer, **wrapper) -> sb.Brain:
    settings = {"normalize_wav": True, "output_norm": False, **wrapper}
    return kind(
        {
            "wav2vec2": StoredEncoder(model, **settings),
            "ctc_lin": nn.Linear(32, 5),
        },
        run_opts={"device": "cpu"},
    )


def reason(brain) -> str:
    with pytest.raises(ValueError) as caught:
        check_descriptions(brain, batch(), CONFIG)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_plain_models(tiny_model):
    check_descriptions(make_brain(tiny_model), batch(), CONFIG)
    check_descriptions(
        make_brain(tiny_model, output_norm=True), batch(), CONFIG
    )
    # Nothing is left behind.
    assert "forward" not in vars(tiny_model)
    assert not tiny_model._forward_hooks


def test_without_a_mask(make_tiny_model):
    class Unmasked(Recognizer):
        def compute_forward(self, batch, stage):
            return self.modules.wav2vec2(batch.sig[0])

    brain = make_brain(make_tiny_model("wav2vec2-base"), Unmasked)
    check_descriptions(brain, batch(), CONFIG)


def test_evaluation_in_16_bits(make_tiny_model):
    """The recipe's precision changes no description."""
    brain = make_brain(make_tiny_model("hubert-large"))
    brain.evaluation_ctx = torch.autocast("cpu", torch.bfloat16)
    check_descriptions(brain, batch(), CONFIG)


def slightly(_module, _args, output):
    """1 % more."""
    return 1.01 * output


@pytest.mark.parametrize(
    "place",
    [
        "feature_extractor.conv_layers.2",
        "feature_projection.projection",
        "encoder.pos_conv_embed",
        "encoder.layers.0.attention.q_proj",
        "encoder.layers.1.feed_forward.intermediate_act_fn",
        "encoder.layers.1.final_layer_norm",
    ],
)
def test_a_hook_changes_what_is_computed(place, make_tiny_model):
    model = make_tiny_model("wav2vec2-large")
    model.get_submodule(place).register_forward_hook(slightly)
    text = reason(make_brain(model))
    assert text.startswith("wav2vec2.model: computes something other")


def test_a_method_is_replaced(make_tiny_model, monkeypatch):
    model = make_tiny_model("hubert-base")
    attention = model.encoder.layers[0].attention
    monkeypatch.setattr(attention, "scaling", attention.scaling * 1.1)
    assert "computes something other" in reason(make_brain(model))


def test_an_output_that_is_not_a_number(make_tiny_model):
    model = make_tiny_model("hubert-base")

    def spoiled(_module, _args, output):
        # Early versions of transformers return a tuple.
        if isinstance(output, tuple):
            return (output[0] * torch.nan, *output[1:])
        return output * torch.nan

    model.encoder.layers[0].register_forward_hook(spoiled)
    assert "computes something other" in reason(make_brain(model))


def test_what_stands_behind_wants_more(make_tiny_model):
    class Weighted(StoredEncoder):
        def forward(self, wav, wav_lens=None):
            self.model.config.output_hidden_states = True
            found = self.model(wav).hidden_states
            self.model.config.output_hidden_states = False
            return torch.stack(found).mean(0)

    brain = make_brain(make_tiny_model("wav2vec2-large"))
    encoder = brain.modules.wav2vec2
    brain.modules["wav2vec2"] = Weighted(encoder.model, True, False)
    assert "from the last hidden state fails" in reason(brain)


def test_a_recipe_that_fails(make_tiny_model):
    class Failing(Recognizer):
        def compute_forward(self, batch, stage):
            raise KeyError("nothing\nhere")

    text = reason(make_brain(make_tiny_model("hubert-base"), Failing))
    assert "VALID stage" in text


def test_no_encoder_no_pass():
    class Failing(Recognizer):
        def compute_forward(self, batch, stage):
            raise AssertionError("was called")

    brain = Failing({"enc": nn.Linear(2, 2)}, run_opts={"device": "cpu"})
    config = QuantizeConfig.from_dict({"target": ["enc"]})
    check_descriptions(brain, batch(), config)


# -- what comes of it ----------------------------------------------------------


def test_auto_goes_on_to_the_simulation(make_tiny_model):
    model = make_tiny_model("wav2vec2-large")
    brain = make_brain(model)
    assert try_descriptions(brain, batch(), CONFIG, "torch_int8") == (
        "torch_int8",
        [],
    )
    model.feature_projection.projection.register_forward_hook(slightly)
    backend, (said,) = try_descriptions(brain, batch(), CONFIG, "torch_int8")
    assert backend == "torch"
    assert said.startswith("Evaluated by simulation: wav2vec2.model: computes")
    assert said.endswith("not supported by the integer runtimes.")
    # The simulation computes the modules themselves.
    assert try_descriptions(brain, batch(), CONFIG, "torch") == ("torch", [])


def test_a_named_backend_is_an_error(make_tiny_model):
    model = make_tiny_model("wav2vec2-large")
    model.feature_projection.projection.register_forward_hook(slightly)
    block = {"target": ["wav2vec2"], "backend": "torch_int8"}
    config = QuantizeConfig.from_dict(block)
    with pytest.raises(ConfigError, match=r"^quantize.backend: wav2vec2.model"):
        try_descriptions(make_brain(model), batch(), config, "torch_int8")
