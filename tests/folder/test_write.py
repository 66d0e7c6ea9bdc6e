"""What a Brain computes, seen from one batch; and reasons for no folder."""

import json
from types import SimpleNamespace

import pytest
import sentencepiece
import speechbrain as sb
import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.inference.ASR import EncoderASR
from speechbrain.lobes.models.VanillaNN import VanillaNN
from speechbrain.nnet.linear import Linear
from speechbrain.utils.autocast import TorchAutocast
from torch import nn

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.brain.describe import (
    NoFolderError,
    describe_recognizer,
)
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import LayerPlan, QuantizationPlan
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder.weights_file import load_checkpoint
from speechbrain_stablequant.folder.write import write_folder
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.model.wrapper import StoredEncoder

LABELS = ["<blank>", " ", *"ABCDEFGHIJ"]
CONFIG = QuantizeConfig.from_dict({})

RECIPE = """\
output_folder: {output}
enc: &id001 !new:speechbrain.lobes.models.VanillaNN.VanillaNN
  input_shape: [null, null, 32]
  activation: !name:torch.nn.LeakyReLU
  dnn_blocks: 2
  dnn_neurons: 24
ctc_lin: &id002 !new:speechbrain.nnet.linear.Linear
  input_size: 24
  n_neurons: 12
modules:
  enc: *id001
  ctc_lin: *id002
"""


class Recognizer(sb.Brain):
    """The usual: encoder, DNN, linear layer."""

    def compute_forward(self, batch, stage):
        wavs, lengths = batch.sig
        hidden = self.modules.enc(self.modules.wav2vec2(wavs, lengths))
        return self.modules.ctc_lin(hidden).log_softmax(-1)


class Batch(SimpleNamespace):
    """Two utterances."""

    def to(self, device):
        return self


def batch():
    """A batch with padding."""
    lengths = torch.tensor([1.0, 0.7])
    return Batch(sig=(torch.randn(2, 4000), lengths))


def text_encoder():
    """A label encoder with the blank in front."""
    encoder = CTCTextEncoder()
    encoder.insert_blank(LABELS[0], 0)
    for label in LABELS[1:]:
        encoder.add_label(label)
    encoder.expect_len(len(LABELS))
    return encoder


@pytest.fixture
def make_brain(make_tiny_model, tmp_path):
    """A Brain of a class, with other modules or hparams if wanted."""

    def make(kind=Recognizer, modules=None, yaml=True, **hparams):
        output = tmp_path / "output"
        output.mkdir(exist_ok=True)
        if yaml:
            text = RECIPE.format(output=output)
            (output / "hyperparams.yaml").write_text(text, encoding="utf-8")
        encoder = StoredEncoder(make_tiny_model("wav2vec2-large"), True, False)
        parts = {
            "wav2vec2": encoder,
            "enc": VanillaNN(
                [None, None, 32],
                activation=nn.LeakyReLU,
                dnn_blocks=2,
                dnn_neurons=24,
            ),
            "ctc_lin": Linear(input_size=24, n_neurons=12),
            **(modules or {}),
        }
        given = {
            "output_folder": str(output),
            "tokenizer": text_encoder(),
            "blank_index": 0,
            **hparams,
        }
        return kind(
            modules={k: m for k, m in parts.items() if m is not None},
            hparams={k: v for k, v in given.items() if v is not None},
            run_opts={"device": "cpu"},
        )

    return make


def describe(brain, config=CONFIG, names=()):
    """What the folder of a Brain needs."""
    return describe_recognizer(brain, batch(), config, names)


def reason(brain, **options) -> str:
    """Why a Brain gets no folder: one line."""
    with pytest.raises(NoFolderError) as caught:
        describe(brain, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(brain, folder, exclude=()):
    """The folder of a Brain, quantized to eight bits."""
    modules = dict(brain.modules.items())
    layers = find_layers(modules, CONFIG.target, exclude=exclude)
    quant = LayerQuant(8, 8, 4.0)
    plan = QuantizationPlan(
        "max",
        8,
        8,
        "",
        {},
        {},
        [],
        [
            LayerPlan(x.name, x.unit, x.kind, quant, 4.0, 100.0, "")
            for x in layers
        ],
    )
    integers = {x.name: integer_layer(x, quant) for x in layers}
    source = describe(brain, names=list(integers))
    write_folder(folder, modules, plan, integers, "float32", source)
    return source


def load(folder):
    """The folder as ``EncoderASR``."""
    return EncoderASR.from_hparams(
        source=str(folder), overrides={"backend": "torch"}
    )


# -- what is seen --------------------------------------------------------------


def test_an_encoder_that_no_integer_runtime_computes(
    make_brain, make_tiny_model, tmp_path
):
    model = make_tiny_model("wav2vec2-large", hidden_act="relu")
    encoder = StoredEncoder(model, True, False)
    brain = make_brain(modules={"wav2vec2": encoder})
    written(brain, tmp_path)
    text = (tmp_path / "hyperparams.yaml").read_text(encoding="utf-8")
    assert "\nbackend: torch\n" in text
    asr = EncoderASR.from_hparams(source=str(tmp_path))
    asr.encode_batch(torch.randn(1, 4000), torch.ones(1))
    assert asr.mods.encoder.runtime == "torch"


def test_the_usual_recipe(make_brain):
    source = describe(make_brain())
    assert source.keys == ("wav2vec2", "enc", "ctc_lin")
    assert source.encoder == {
        "key": "wav2vec2",
        "use_lengths": True,
        "normalize_wav": True,
        "output_norm": False,
        "output_all_hiddens": False,
    }
    assert source.tokenizer_file == "label_encoder.txt"
    assert source.blank_index == 0
    assert json.loads(source.config)["model_type"] == "wav2vec2"
    assert "!new:speechbrain.lobes.models.VanillaNN" in source.heads["enc"]
    assert "&id" not in source.heads["enc"]


def test_the_usual_recipe_loads(make_brain, tmp_path):
    brain = make_brain()
    written(brain, tmp_path)
    asr = load(tmp_path)
    wavs, lengths = batch().sig
    with torch.no_grad():
        expected = brain.compute_forward(batch(), sb.Stage.VALID)
    assert asr.encode_batch(wavs, lengths).shape == expected.shape
    assert len(asr.transcribe_batch(wavs, lengths)[0]) == 2


def test_float_layers_give_the_same_output(make_brain, tmp_path):
    """All but one small layer is float: the rebuilt parts are the same."""
    brain = make_brain()
    written(brain, tmp_path, exclude=["wav2vec2.*", "enc.*"])
    data = batch()
    with torch.no_grad():
        features = brain.modules.enc(brain.modules.wav2vec2(*data.sig))
    parts = load(tmp_path).mods.encoder.parts
    with torch.no_grad():
        found = parts["enc"](parts["wav2vec2"](*data.sig))
    assert torch.equal(found, features)


def test_recipe_that_evaluates_in_16_bits(make_brain):
    """What is rebuilt is compared as it was observed."""
    brain = make_brain()
    brain.evaluation_ctx = TorchAutocast("cpu", dtype=torch.bfloat16)
    assert describe(brain).keys == ("wav2vec2", "enc", "ctc_lin")


def test_recipe_without_a_mask(make_brain, tmp_path):
    class Unmasked(Recognizer):
        def compute_forward(self, batch, stage):
            wavs, _ = batch.sig
            hidden = self.modules.enc(self.modules.wav2vec2(wavs))
            return self.modules.ctc_lin(hidden)

    brain = make_brain(Unmasked)
    assert written(brain, tmp_path).encoder["use_lengths"] is False
    asr = load(tmp_path)
    wavs, _ = batch().sig
    one = asr.encode_batch(wavs, torch.tensor([1.0, 0.7]))
    two = asr.encode_batch(wavs, torch.tensor([1.0, 0.2]))
    assert torch.equal(one, two)


def test_order_of_use_and_modules_that_are_not_used(make_brain):
    brain = make_brain(modules={"augment": nn.Linear(3, 3)})
    assert describe(brain).keys == ("wav2vec2", "enc", "ctc_lin")


def test_plain_modules_need_no_yaml(make_brain, tmp_path):
    enc = nn.Sequential(
        nn.Linear(32, 24, bias=False),
        nn.LayerNorm(24, eps=1e-3),
        nn.LeakyReLU(0.3),
        nn.Dropout(0.2),
        nn.Identity(),
    )
    brain = make_brain(modules={"enc": enc}, yaml=False)
    source = written(brain, tmp_path)
    assert "!new:torch.nn.Sequential" in source.heads["enc"]
    rebuilt = load(tmp_path).mods.encoder.parts["enc"]
    assert str(rebuilt) == str(enc)


def test_names_of_layers_follow_the_target(make_brain):
    """A module behind two keys goes by the one that its layers are named by."""
    brain = make_brain()
    brain.modules["again"] = brain.modules["ctc_lin"]
    assert describe(brain).keys[-1] == "ctc_lin"
    config = QuantizeConfig.from_dict({"target": ["wav2vec2", "again"]})
    assert describe(brain, config).keys[-1] == "again"


def test_sentencepiece(make_brain, tmp_path):
    corpus = tmp_path / "text.txt"
    corpus.write_text("AB CD EF GH IJ\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "pieces"),
        vocab_size=12,
        model_type="char",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    processor = sentencepiece.SentencePieceProcessor()
    processor.Load(str(tmp_path / "pieces.model"))
    # As SpeechBrain's own class holds it.
    brain = make_brain(tokenizer=SimpleNamespace(sp=processor))
    folder = tmp_path / "folder"
    folder.mkdir()
    assert written(brain, folder).tokenizer_file == "tokenizer.model"
    asr = load(folder)
    wavs, lengths = batch().sig
    words, tokens = asr.transcribe_batch(wavs, lengths)
    assert words == [processor.decode_ids(ids) for ids in tokens]


def test_blank_of_the_text_encoder(make_brain):
    brain = make_brain(blank_index=None)
    assert describe(brain).blank_index == 0


# -- reasons -------------------------------------------------------------------


def test_changed_audio(make_brain):
    class Louder(Recognizer):
        def compute_forward(self, batch, stage):
            wavs, lengths = batch.sig
            return super().compute_forward(
                Batch(sig=(2 * wavs, lengths)), stage
            )

    assert "something other than the audio" in reason(make_brain(Louder))


def test_computing_between_the_modules(make_brain):
    class Scaled(Recognizer):
        def compute_forward(self, batch, stage):
            hidden = self.modules.wav2vec2(*batch.sig)
            return self.modules.ctc_lin(self.modules.enc(hidden * 0.5))

    text = reason(make_brain(Scaled))
    assert "'enc' gets something other than the output of 'wav2vec2'" in text


def test_a_module_used_twice(make_brain):
    class Twice(Recognizer):
        def compute_forward(self, batch, stage):
            super().compute_forward(batch, stage)
            return super().compute_forward(batch, stage)

    assert "calls 'wav2vec2' repeatedly" in reason(make_brain(Twice))


def test_no_module_used(make_brain):
    class Nothing(Recognizer):
        def compute_forward(self, batch, stage):
            return None

    assert "calls none of its `modules`" in reason(make_brain(Nothing))


def test_a_quantized_layer_that_is_not_used(make_brain):
    class Short(Recognizer):
        def compute_forward(self, batch, stage):
            return self.modules.wav2vec2(*batch.sig)

    text = reason(make_brain(Short), names=["ctc_lin.w"])
    assert "layer 'ctc_lin.w' was not used" in text


def test_another_wrapper(make_brain, make_tiny_modules):
    other = make_tiny_modules("wav2vec2-large")["wav2vec2"]
    text = reason(make_brain(modules={"wav2vec2": other}))
    assert text.startswith("'wav2vec2' is a TinyWrapper, not SpeechBrain's")


def test_a_wrapper_with_a_forward_of_its_own(make_brain, make_tiny_model):
    class Shifted(StoredEncoder):
        def forward(self, wav, wav_lens=None):
            return super().forward(wav, wav_lens) + 1

    shifted = Shifted(make_tiny_model("wav2vec2-large"), True, False)
    text = reason(make_brain(modules={"wav2vec2": shifted}))
    assert "'wav2vec2' gives something other than SpeechBrain's" in text


def test_an_activation_that_is_not_the_configurations(make_brain):
    """The folder would compute the one that the configuration names."""
    brain = make_brain()
    block = brain.modules.wav2vec2.model.encoder.layers[1]
    block.feed_forward.intermediate_act_fn = nn.ReLU()
    assert reason(brain) == (
        "'wav2vec2.model.encoder.layers.1.feed_forward.intermediate_act_fn' is "
        "ReLU(), and the model's configuration describes GELUActivation()"
    )


def test_a_norm_with_another_epsilon(make_brain):
    brain = make_brain()
    brain.modules.wav2vec2.model.encoder.layer_norm.eps = 1e-3
    text = reason(brain)
    assert "'wav2vec2.model.encoder.layer_norm' is LayerNorm((32,), " in text
    assert "eps=0.001" in text
    assert "eps=1e-05" in text


def test_a_hook_inside_of_the_encoder(make_brain):
    """No setting shows it; what is computed does."""
    brain = make_brain()
    block = brain.modules.wav2vec2.model.encoder.layers[0]
    block.attention.register_forward_hook(
        lambda _module, _args, output: (1.1 * output[0], *output[1:])
    )
    text = reason(brain)
    assert "'wav2vec2' gives something other than SpeechBrain's wrapper" in text


def test_dropout_that_was_changed_is_none(make_brain):
    brain = make_brain()
    brain.modules.wav2vec2.model.encoder.dropout.p = 0.77
    assert describe(brain).keys == ("wav2vec2", "enc", "ctc_lin")


def test_a_head_without_a_node(make_brain):
    text = reason(make_brain(yaml=False))
    assert text.startswith("'enc' (VanillaNN) has no `!new:` node")


def test_a_head_that_was_changed_after_the_yaml(make_brain):
    other = VanillaNN([None, None, 32], dnn_blocks=1, dnn_neurons=24)
    text = reason(make_brain(modules={"enc": other}))
    assert "'enc' does not have the parameters of its YAML node" in text
    relu = VanillaNN(
        [None, None, 32], activation=nn.ReLU, dnn_blocks=2, dnn_neurons=24
    )
    text = reason(make_brain(modules={"enc": relu}))
    assert "'enc' gives something other than its YAML node" in text


def test_a_node_that_calls_a_function(make_brain, tmp_path):
    brain = make_brain()
    path = tmp_path / "output" / "hyperparams.yaml"
    text = path.read_text(encoding="utf-8")
    changed = text.replace("dnn_neurons: 24", "dnn_neurons: !apply:int [24]")
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    assert "'enc' (VanillaNN) has no `!new:` node" in reason(brain)


def test_max_norm(make_brain):
    head = Linear(input_size=24, n_neurons=12, max_norm=1.0)
    text = reason(make_brain(modules={"ctc_lin": head}))
    assert "'ctc_lin' has a max_norm" in text


def test_no_tokenizer(make_brain):
    assert "set brain.tokenizer" in reason(make_brain(tokenizer=None))


def test_no_blank(make_brain):
    encoder = CTCTextEncoder()
    encoder.add_label("A")
    brain = make_brain(tokenizer=encoder, blank_index=None)
    assert "no key `blank_index`" in reason(brain)


# -- without a folder ----------------------------------------------------------


def test_weights_are_written_without_a_description(make_brain, tmp_path):
    brain = make_brain()
    written(brain, tmp_path)
    plan = load_checkpoint(tmp_path).plan
    modules = dict(brain.modules.items())
    layers = find_layers(modules, CONFIG.target)
    quants = plan.quants()
    integers = {x.name: integer_layer(x, quants[x.name]) for x in layers}
    write_folder(tmp_path, modules, plan, integers, "float16", None)
    # An old description would be about other files.
    assert not (tmp_path / "hyperparams.yaml").exists()
    found = load_checkpoint(tmp_path)
    assert found.integers.keys() == integers.keys()
