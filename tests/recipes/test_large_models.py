"""The recipe on checkpoints of the large models' architecture, made here.

The real ones are 1.2 GB each. These have the same layers in the same order
(LayerNorm front end with biases, normalization before each block) and the
same vocabulary, some thousand times smaller and untrained.
"""

import json
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from hyperpyyaml import resolve_references
from safetensors import safe_open
from speechbrain.inference.ASR import EncoderASR
from transformers import (
    HubertConfig,
    HubertForCTC,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from speechbrain_stablequant.runtimes.cpu import cpu_class

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "LibriSpeech/ASR/CTC"

# The vocabulary of the LibriSpeech checkpoints.
LABELS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]

#: Of both models, but for the widths and the number of blocks.
ARCHITECTURE = {
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "vocab_size": len(LABELS),
    "pad_token_id": 0,
    "conv_dim": (32,) * 7,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
}

MODELS = {
    "hubert_large": (
        "facebook/hubert-large-ls960-ft",
        HubertConfig,
        HubertForCTC,
    ),
    "wav2vec2_large": (
        "facebook/wav2vec2-large-960h-lv60-self",
        Wav2Vec2Config,
        Wav2Vec2ForCTC,
    ),
}

# Nothing is trained: the float model's WER says nothing.
BLOCK = "{calibration: {num_utterances: 2}, search: {max_float_wer: 1000}}"


def make_checkpoint(name: str, folder: Path) -> None:
    """An untrained CTC checkpoint, in the files of the hub's."""
    _, config, model = MODELS[name]
    made = model(config(**ARCHITECTURE))
    # As of a trained one, <s>, </s> and <unk> are nowhere the best label.
    made.lm_head.bias.data[1:4] = -100.0
    made.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        do_normalize=True, return_attention_mask=True
    ).save_pretrained(folder)
    vocabulary = folder.parent / "vocabulary.json"
    vocabulary.write_text(
        json.dumps({label: i for i, label in enumerate(LABELS)})
    )
    Wav2Vec2CTCTokenizer(vocabulary).save_pretrained(folder)


def make_corpus(folder: Path) -> None:
    """dev-clean and test-clean with two utterances of noise each."""
    random = numpy.random.RandomState(0)
    for split in ("dev-clean", "test-clean"):
        chapter = folder / split / "11" / "22"
        chapter.mkdir(parents=True)
        lines = []
        for index in range(2):
            name = f"11-22-{index:04}"
            audio = 0.1 * random.standard_normal(12000 + 4000 * index)
            soundfile.write(chapter / f"{name}.flac", audio, 16000)
            lines.append(f"{name} NOTHING WAS SAID\n")
        (chapter / "11-22.trans.txt").write_text("".join(lines))


@pytest.fixture(
    scope="module",
    params=[
        "hubert_large",
        pytest.param("wav2vec2_large", marks=pytest.mark.slow),
    ],
)
def ran(request, run, tmp_path_factory):
    """The recipe of one model, run as its user runs it."""
    name = request.param
    root = tmp_path_factory.mktemp(name)
    torch.manual_seed(11)
    make_checkpoint(name, root / "checkpoint")
    make_corpus(root / "LibriSpeech")
    done = run(
        root / "output",
        *("--data_folder", root / "LibriSpeech"),
        *("--wav2vec2_hub", root / "checkpoint"),
        *("--method", "max", "--quantize", BLOCK),
        hparams=f"hparams/quant_{name}.yaml",
    )
    assert done.code == 0, done.out + done.err
    return name, root


@pytest.mark.parametrize("name", sorted(MODELS))
def test_protocol_of_the_paper(name):
    """dev-clean decides, test-clean is evaluated, nothing is trained."""
    path = RECIPE / "hparams" / f"quant_{name}.yaml"
    with open(path, encoding="utf-8") as stream:
        text = resolve_references(stream, {"data_folder": "x"}).getvalue()
    for line in (
        f"wav2vec2_hub: {MODELS[name][0]}",
        "dev_splits: [dev-clean]",
        "test_splits: [test-clean]",
        "train_splits: []",
        "number_of_epochs: 0",
        "method: stablequant",
        "weight_bits: 8",
        "activation_bits: 8",
    ):
        assert line in text, line


def test_report(ran):
    _, root = ran
    folder = root / "output" / "quantized"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(report["test"]) == ["test-clean"]
    assert report["test"]["test-clean"]["float"]["utterances"] == 2
    # The weights are random.
    expected = ["recognizes next to nothing"]
    expected += ["has no VNNI"] * (not cpu_class().exact)
    for words in expected:
        assert sum(words in w for w in report["warnings"]) == 1
    assert len(report["warnings"]) == len(expected)
    names = [unit["name"] for unit in report["units"]]
    assert names == [
        *(f"conv.{index}" for index in range(7)),
        *("projection", "pos_conv", "block.0", "block.1", "block.2", "head"),
    ]
    size = report["size_mb"]
    assert size["quantized"] < size["float"] / 2


def test_folder_transcribes(ran):
    name, root = ran
    folder = root / "output" / "quantized" / "model"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == name.partition("_")[0]
    asr = EncoderASR.from_hparams(source=str(folder))
    audio = sorted((root / "LibriSpeech" / "test-clean").rglob("*.flac"))
    for file in audio:
        assert isinstance(asr.transcribe_file(str(file)), str)
    # The labels are the checkpoint's, and so is the blank.
    assert asr.tokenizer.ind2lab[5] == "E"
    assert asr.tokenizer.ind2lab[4] == " "
    assert asr.hparams.blank_index == 0


def test_folder_has_the_checkpoint_s_weights(ran):
    _, root = ran
    folder = root / "output" / "quantized" / "model"
    with (
        safe_open(folder / "model.safetensors", framework="pt") as found,
        safe_open(
            root / "checkpoint" / "model.safetensors", framework="pt"
        ) as original,
    ):
        scale = found.get_tensor("ctc_lin.weight_scale")
        weight = found.get_tensor("ctc_lin.weight").float() * scale[:, None]
        expected = original.get_tensor("lm_head.weight")
        bias = found.get_tensor("ctc_lin.bias").float()
        assert torch.equal(
            bias, original.get_tensor("lm_head.bias").half().float()
        )
    # Half a step, as rounding is.
    assert ((weight - expected).abs() <= 0.501 * scale[:, None]).all()
