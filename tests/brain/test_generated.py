"""Inference YAMLs that are generated from a recipe's own."""

import shutil

import pytest
import small_recipes as recipes
import speechbrain.inference.ASR as interfaces
import torch
from safetensors.torch import load_file
from small_recipes import CONFORMER, FEATURES, folder_of, transcripts
from tiny_whisper import save_whisper
from transformers import Wav2Vec2FeatureExtractor

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.brain.generated import loading_class
from speechbrain_stablequant.brain.metrics import Row
from speechbrain_stablequant.brain.rebuilt import check_texts, describe_modules
from speechbrain_stablequant.folder.errors import NoFolderError
from speechbrain_stablequant.folder.module_state import COMPUTED
from speechbrain_stablequant.inference import LabelTokenizer

CTC = ["CNN", "Transformer", "ctc_lin"]
FAMILIES = {
    "ctc": (
        recipes.Conformer,
        FEATURES + CONFORMER + recipes.CTC_RECIPE,
        CTC,
        "EncoderASR",
    ),
    "ctc-beam": (
        recipes.BeamConformer,
        FEATURES + CONFORMER + recipes.CTC_RECIPE,
        CTC,
        "EncoderASR",
    ),
    "transformer": (
        recipes.Seq2Seq,
        FEATURES + recipes.SEQ2SEQ_RECIPE,
        [*CTC, "seq_lin"],
        "EncoderDecoderASR",
    ),
    "crdnn": (
        recipes.CRDNN,
        FEATURES + recipes.CRDNN_RECIPE,
        ["enc", "dec", "seq_lin"],
        "EncoderDecoderASR",
    ),
    "transducer": (
        recipes.Transducer,
        FEATURES + CONFORMER + recipes.TRANSDUCER_RECIPE,
        ["CNN", "enc", "proj_enc", "proj_dec", "transducer_lin"],
        "EncoderDecoderASR",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_transcribes_as_the_recipe_does(family, tmp_path):
    kind, text, target, interface = FAMILIES[family]
    brain = recipes.make(kind, text, tmp_path)
    config = QuantizeConfig.from_dict({"target": target})
    assert loading_class(brain) == interface
    heard = folder_of(brain, config, tmp_path / "folder")
    assert all(len(text) > 2 for text in heard)
    written = (tmp_path / "folder" / "hyperparams.yaml").read_text()
    assert str(tmp_path) not in written
    asr = getattr(interfaces, interface).from_hparams(
        source=tmp_path / "folder", overrides={"backend": "torch"}
    )
    assert transcripts(asr) == heard
    names = load_file(tmp_path / "folder" / "model.safetensors")
    tables = [name for name in names if name.endswith("positional_encoding.pe")]
    assert all(name.startswith(COMPUTED) for name in tables)
    assert tables or family != "transformer"


class Scaled(recipes.Conformer):
    """Changes the features between two modules."""

    def features(self, batch):
        x, lengths = super().features(batch)
        return 2 * x, lengths


def test_what_a_recipe_computes_between_modules_is_no_guess(tmp_path):
    _, text, target, _ = FAMILIES["ctc"]
    brain = recipes.make(Scaled, text, tmp_path)
    config = QuantizeConfig.from_dict({"target": target})
    with pytest.raises(NoFolderError, match="what 'Transformer' gets is the"):
        folder_of(brain, config, tmp_path / "folder")


def test_without_a_yaml_there_is_a_line(tmp_path):
    kind, text, target, _ = FAMILIES["ctc"]
    brain = recipes.make(kind, text, tmp_path)
    (tmp_path / "output" / "hyperparams.yaml").unlink()
    config = QuantizeConfig.from_dict({"target": target})
    with pytest.raises(NoFolderError, match="give quantize"):
        folder_of(brain, config, tmp_path / "folder")


@pytest.mark.parametrize("given", [False, True], ids=["generated", "given"])
def test_a_model_of_huggingface_needs_no_hub(make_tiny_model, given, tmp_path):
    hub = tmp_path / "hub"
    make_tiny_model("wav2vec2-base").save_pretrained(hub)
    Wav2Vec2FeatureExtractor().save_pretrained(hub)
    text = recipes.HUGGINGFACE.replace("HUB", str(hub))
    brain = recipes.make(
        recipes.HuggingFace, text + recipes.HUGGINGFACE_RECIPE, tmp_path
    )
    block = {"target": ["wav2vec2", "ctc_lin"]}
    if given:
        path = tmp_path / "inference.yaml"
        path.write_text(text + recipes.HUGGINGFACE_INFERENCE)
        block["inference"] = str(path)
    config = QuantizeConfig.from_dict(block)
    heard = folder_of(brain, config, tmp_path / "folder")
    shutil.rmtree(hub)
    for file in (tmp_path / "folder").glob("*.[jy]*"):
        assert str(hub) not in file.read_text()
    asr = interfaces.EncoderASR.from_hparams(
        source=tmp_path / "folder", overrides={"backend": "torch"}
    )
    assert transcripts(asr) == heard


def test_the_encoder_of_whisper_with_a_ctc_head(tmp_path):
    hub = tmp_path / "hub"
    save_whisper(hub)
    text = recipes.WHISPER_CTC.replace("HUB", str(hub))
    brain = recipes.make(recipes.WhisperCTC, text, tmp_path)
    brain.modules.float()
    config = QuantizeConfig.from_dict({"target": ["whisper", "ctc_lin"]})
    heard = folder_of(brain, config, tmp_path / "folder")
    shutil.rmtree(hub)
    asr = interfaces.EncoderASR.from_hparams(
        source=tmp_path / "folder", overrides={"backend": "torch"}
    )
    assert transcripts(asr) == heard


def test_labels_are_the_tokenizer_of_a_searcher(tmp_path):
    """As of recipes for TIMIT, whose hypotheses are phonemes."""
    kind, text, target, _ = FAMILIES["crdnn"]
    brain = recipes.make(kind, text, tmp_path)
    brain.tokenizer = LabelTokenizer()
    for i in range(24):
        brain.tokenizer.add_label("aeiou"[i // 5] + "bdgmn"[i % 5])
    brain.tokenizer.expect_len(24)
    config = QuantizeConfig.from_dict({"target": target})
    heard = folder_of(brain, config, tmp_path / "folder")
    assert all(" " in text for text in heard)
    asr = interfaces.EncoderDecoderASR.from_hparams(
        source=tmp_path / "folder", overrides={"backend": "torch"}
    )
    assert transcripts(asr) == heard


def test_markers_of_a_tokenizer_of_huggingface_are_no_text(tmp_path):
    """As of AISHELL's recipe, which takes them out after its beam search."""
    _, text, target, _ = FAMILIES["ctc"]
    brain = recipes.make(recipes.MarkedConformer, text, tmp_path)
    brain.tokenizer = recipes.Bert()
    config = QuantizeConfig.from_dict({"target": target})
    names = [f"{key}." for key in target]
    batch = recipes.batch()
    source, _ = describe_modules(brain, batch, config, names)
    assert "MarkedBeamSearcher" in source.text
    with torch.no_grad():
        _, texts = brain.compute_forward(batch, None)
    assert any("[" in text for text in texts)


def test_characters_may_be_counted_without_spaces():
    # As AISHELL's recipe does.
    check_texts([Row("u", (*"ABC",), (*"ABA",))], ["AB A"], "EncoderASR")
    words = [Row("u", ("AB", "C"), ("AB", "A"))]
    with pytest.raises(NoFolderError, match=r"u is 'AB A' .*, and 'A BA' with"):
        check_texts(words, ["A BA"], "EncoderASR")
