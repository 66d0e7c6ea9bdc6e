"""A pretrained recognizer without a recipe: as the recipe's Brain would be."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import small_recipes
import soundfile
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio import encoder as label_encoder
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.decoders import ctc_greedy_decode
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR
from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from speechbrain.lobes.models.VanillaNN import VanillaNN
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.losses import ctc_loss
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor

import speechbrain_stablequant
from speechbrain_stablequant import (
    ConfigError,
    QuantizationPlan,
    StableQuant,
    quantize_pretrained,
)
from speechbrain_stablequant.brain import pretrained
from speechbrain_stablequant.brain.manifest import ManifestError
from speechbrain_stablequant.brain.pretrained_brain import (
    PretrainedBrain,
    Recognizer,
)

HYPERPARAMS = """\
wav2vec2: !new:speechbrain.integrations.huggingface.wav2vec2.Wav2Vec2
    source: {encoder}
    save_path: {encoder}
    freeze: True
enc: !new:speechbrain.lobes.models.VanillaNN.VanillaNN
    input_shape: [null, null, 32]
    dnn_blocks: 1
    dnn_neurons: 24
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 24
    n_neurons: 12
asr_model: !new:torch.nn.ModuleList
    - [!ref <enc>, !ref <ctc_lin>]
log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    wav2vec2: !ref <wav2vec2>
    enc: !ref <enc>
    ctc_lin: !ref <ctc_lin>
    log_softmax: !ref <log_softmax>
modules:
    encoder: !ref <encoder>
tokenizer: !new:speechbrain.dataio.encoder.CTCTextEncoder
decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: 0
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        wav2vec2: !ref <wav2vec2>
        asr_model: !ref <asr_model>
        tokenizer: !ref <tokenizer>
"""

BLOCK = {
    "weight_bits": 4,
    "activation_bits": 4,
    "calibration": {"num_utterances": 3},
    "search": {"num_utterances": 4, "cutoffs": [100, 99.0]},
    "backend": "torch",
}
RUN = {"device": "cpu", "noprogressbar": True}


def make_source(
    folder: Path, model: PreTrainedModel
) -> dict[str, torch.nn.Module]:
    """A folder as the Hub has it, of a recognizer with this encoder; its
    modules."""
    encoder = folder / "encoder"
    model.save_pretrained(encoder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(
        encoder
    )
    modules = {
        "wav2vec2": Wav2Vec2(str(encoder), str(encoder), freeze=True),
        "enc": VanillaNN([None, None, 32], dnn_blocks=1, dnn_neurons=24),
        "ctc_lin": Linear(input_size=24, n_neurons=12),
    }
    with torch.no_grad():
        modules["ctc_lin"].w.weight.mul_(20)
    torch.save(modules["wav2vec2"].state_dict(), folder / "wav2vec2.ckpt")
    rest = torch.nn.ModuleList([modules["enc"], modules["ctc_lin"]])
    torch.save(rest.state_dict(), folder / "asr_model.ckpt")
    make_labels().save(str(folder / "tokenizer.ckpt"))
    text = HYPERPARAMS.format(encoder=encoder)
    (folder / "hyperparams.yaml").write_text(text, encoding="utf-8")
    return modules


def make_labels() -> CTCTextEncoder:
    """A blank, a space and ten letters."""
    labels = CTCTextEncoder()
    labels.insert_blank("<blank>", 0)
    labels.update_from_iterable("abcde fghij")
    return labels


def write_manifest(
    path: Path, source: Path, numbers: range, kind: type = EncoderASR, word="a"
) -> None:
    """A CSV of noise, with what the float model recognizes, or nearly so."""
    asr = kind.from_hparams(source=str(source))
    rows = [("ID", "duration", "wav", "wrd")]
    for number in numbers:
        wave = torch.randn(1, 9000 + 700 * number)
        (text,), _ = asr.transcribe_batch(wave, torch.ones(1))
        file = path.with_name(f"u{number}.wav")
        soundfile.write(file, wave[0].numpy(), 16000, subtype="FLOAT")
        rows.append((file.stem, 1, f"$data_root/{file.name}", f"{word} {text}"))
    with open(path, "w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows(rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_tiny_model) -> Path:
    """A source and two manifests."""
    place = tmp_path_factory.mktemp("pretrained")
    source = place / "source"
    source.mkdir()
    torch.manual_seed(0)
    make_source(source, make_tiny_model("wav2vec2-large"))
    write_manifest(place / "dev.csv", source, range(6))
    write_manifest(place / "test.csv", source, range(6, 9))
    return place


@pytest.fixture(scope="module")
def made(place) -> speechbrain_stablequant.QuantizedSource:
    """The source, quantized."""
    return quantize_pretrained(
        place / "source",
        place / "dev.csv",
        place / "made",
        test_manifest=place / "test.csv",
        run_opts=RUN,
        **BLOCK,
    )


class Recipe(sb.Brain):
    """A Brain as recipes have it."""

    def compute_forward(self, batch, stage):
        """Log probabilities, lengths and labels."""
        batch = batch.to(self.device)
        wavs, lengths = batch.sig
        hidden = self.modules.enc(self.modules.wav2vec2(wavs, lengths))
        scores = self.modules.ctc_lin(hidden).log_softmax(-1)
        found = ctc_greedy_decode(scores, lengths, blank_id=0)
        return scores, lengths, found

    def compute_objectives(self, predictions, batch, stage):
        """The CTC loss; counts the errors."""
        scores, lengths, found = predictions
        words = [
            "".join(labels).split()
            for labels in self.hparams.tokenizer.decode_ndim(found)
        ]
        targets = [text.split() for text in batch.wrd]
        self.wer_metric.append(batch.id, words, targets)
        tokens, token_lengths = batch.tokens
        return ctc_loss(scores, tokens, lengths, token_lengths, 0)

    def on_stage_start(self, stage, epoch=None):
        """New statistics."""
        self.wer_metric = sb.utils.metric_stats.ErrorRateStats()


def data_of(manifest: Path) -> DynamicItemDataset:
    """The data set of a recipe."""
    labels = make_labels()
    data = DynamicItemDataset.from_csv(
        manifest, replacements={"data_root": manifest.parent}
    )
    data.add_dynamic_item(read_audio, takes="wav", provides="sig")
    data.add_dynamic_item(
        lambda wrd: torch.LongTensor(labels.encode_sequence(list(wrd))),
        takes="wrd",
        provides="tokens",
    )
    data.set_output_keys(["id", "sig", "wrd", "tokens"])
    return data


def test_equal_to_a_brain(place, made, tmp_path):
    modules = make_source_modules(place / "source")
    hparams = {"tokenizer": make_labels(), "blank_index": 0}
    # The YAML nodes of its modules.
    hparams["output_folder"] = str(tmp_path)
    text = HYPERPARAMS.format(encoder=place / "source" / "encoder")
    start = text.index("enc: ")
    lines = text[start : text.index("asr_model")].splitlines()
    nodes = "\n".join(f"    {line}" for line in lines)
    (tmp_path / "hyperparams.yaml").write_text(
        f"modules:\n{nodes}\n", encoding="utf-8"
    )
    brain = Recipe(modules, None, hparams, dict(RUN))
    attached = StableQuant.attach(
        brain,
        valid_set=data_of(place / "dev.csv"),
        output_folder=str(tmp_path / "quantized"),
        **BLOCK,
    )
    brain.evaluate(
        data_of(place / "test.csv"), test_loader_kwargs={"batch_size": 1}
    )
    (run,) = attached.runs
    assert run.source is not None
    for name in (
        *("plan.json", "model/plan.json", "model/model.safetensors"),
        *("model/hyperparams.yaml", "model/config.json", "wer_test.txt"),
        *("model/recognizer.json", "model/label_encoder.txt"),
    ):
        own, other = (x / name for x in (made.folder, run.folder))
        assert own.read_bytes() == other.read_bytes(), name
    plan = QuantizationPlan.load(made.folder / "plan.json")
    assert any(unit.selected for unit in plan.units)


def make_source_modules(source: Path) -> Mapping[str, torch.nn.Module]:
    """The modules of a source by the keys of a recipe."""
    chain = EncoderASR.from_hparams(source=str(source)).mods.encoder
    return {key: chain[key] for key in ("wav2vec2", "enc", "ctc_lin")}


def test_result(made):
    report = json.loads(made.report.read_text(encoding="utf-8"))
    (rates,) = report["test"].values()
    assert made.float_wer == rates["float"]["WER"]
    assert made.quantized_wer == rates["quantized"]["WER"] != made.float_wer
    assert rates["float"]["utterances"] == 3
    wave = torch.randn(1, 12000)
    texts = [
        EncoderASR.from_hparams(
            source=str(made.model), overrides={"backend": "torch"}
        ).transcribe_batch(wave, torch.ones(1))[0][0],
        speechbrain_stablequant.load(
            made.folder, backend="torch"
        ).transcribe_batch(wave, torch.ones(1))[0][0],
    ]
    assert texts[0] == texts[1] != ""


def test_halves(place, tmp_path):
    quantize_pretrained(
        place / "source",
        place / "dev.csv",
        tmp_path,
        run_opts=RUN,
        method="max",
        backend="torch",
        seed=3,
    )
    effort = json.loads((tmp_path / "effort.json").read_text("utf-8"))
    assert '"calibration": 3' in json.dumps(effort)
    text = (tmp_path / "wer_test.txt").read_text(encoding="utf-8")
    tested = [name for name in map("u{}".format, range(6)) if name in text]
    assert len(tested) == 3


def test_audio_alone(place, tmp_path):
    files = sorted(place.glob("u*.wav"))
    made = quantize_pretrained(
        place / "source",
        files[:4],
        tmp_path,
        run_opts=RUN,
        method="mse",
        backend="torch",
        weight_bits=3,
        activation_bits=3,
    )
    assert made.float_wer == 0
    assert made.quantized_wer > 0
    report = json.loads(made.report.read_text(encoding="utf-8"))
    assert any("no transcripts" in line for line in report["warnings"])
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "Calibration: 2 utterances of the manifest" in text
    assert "validation" not in text
    # Settings that this method reads; the others are in report.json.
    assert "| calibration.num_bins |" in text
    assert "| search.cutoffs |" not in text
    assert "cutoffs" in report["settings"]["search"]


def test_more_utterances_than_a_manifest_has(place, tmp_path):
    with pytest.raises(ValueError, match="9 asked, but the manifest has 3"):
        quantize_pretrained(
            place / "source",
            place / "dev.csv",
            tmp_path,
            run_opts=RUN,
            method="max",
            calibration={"num_utterances": 9},
        )


@pytest.mark.parametrize(
    ("block", "line"),
    [
        ({"method": "qat"}, "quantize.method: qat trains"),
        ({"method": "stablequant"}, "method: stablequant compares word error"),
        ({"variants": [{"name": "a"}]}, "method: stablequant compares word"),
        ({"output_folder": "x"}, "quantize.output_folder: is the argument"),
        ({"weight_bitz": 6}, "quantize.weight_bitz: unknown key"),
        ({"seed": "x"}, "quantize.seed: "),
        ({"seed": None}, "quantize.seed: "),
    ],
)
def test_refused_before_loading(place, block, line):
    files = sorted(place.glob("u*.wav"))
    with pytest.raises(ConfigError, match=line):
        quantize_pretrained(place / "nowhere", files, place / "x", **block)


def test_a_wrong_target_is_found_before_any_work(place, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the audio was transcribed first")

    monkeypatch.setattr(pretrained, "_transcribed", never)
    files = sorted(place.glob("u*.wav"))
    options = {"method": "mse", "backend": "torch", "run_opts": RUN}
    with pytest.raises(ValueError, match=r"quantize.target.*encoderr"):
        quantize_pretrained(
            place / "source", files, tmp_path, target=["encoderr"], **options
        )


def test_nothing_warns_of_a_training(place, monkeypatch, caplog):
    """Of labels whose count nobody told, and of no trainable parameters."""
    said = []
    monkeypatch.setattr(label_encoder.logger, "warning_once", said.append)
    asr = EncoderASR.from_hparams(source=str(place / "source"))
    assert not hasattr(asr.tokenizer, "expected_len")
    recognizer = Recognizer(asr, None)
    caplog.clear()
    brain = PretrainedBrain(recognizer, RUN)
    _, (text,) = recognizer.transcribe(torch.randn(1, 9000), torch.ones(1))
    assert text and not said
    assert not any(p.requires_grad for p in brain.modules.parameters())
    assert "trainable" not in caplog.text


def test_a_device_that_is_not_there(place):
    with pytest.raises(ValueError, match=r"^device: Expected one of cpu"):
        quantize_pretrained(
            place / "nowhere",
            place / "dev.csv",
            place / "x",
            run_opts={"device": "abacus"},
        )


def test_data_that_does_not_fit(place):
    files = sorted(place.glob("u*.wav"))
    with pytest.raises(ManifestError, match="one utterance cannot be divided"):
        quantize_pretrained("nowhere", files[:1], "x")
    with pytest.raises(ManifestError, match="has no transcripts, and the"):
        quantize_pretrained(
            "nowhere", files, "x", test_manifest=place / "dev.csv"
        )
    assert not Path("x").exists()


def test_variants_normalization_and_shared_utterances(place, tmp_path):
    text = (place / "dev.csv").read_text(encoding="utf-8")
    head, *rows = text.splitlines()
    loud = place / "loud.csv"
    rows = [
        f"{row[: row.rindex(',')]}{row[row.rindex(',') :].upper()}"
        for row in rows
    ]
    loud.write_text("\n".join([head, *rows]), encoding="utf-8")
    options = {"run_opts": RUN, "method": "max", "backend": "torch"}
    with pytest.raises(ValueError, match="no label of the recipe's tokenizer"):
        quantize_pretrained(place / "source", loud, tmp_path, **options)
    made = quantize_pretrained(
        place / "source",
        loud,
        tmp_path,
        test_manifest=loud,
        normalize=str.lower,
        variants=[{"name": "w8"}, {"name": "w4", "weight_bits": 4}],
        **options,
    )
    assert list(made) == ["w8", "w4"]
    assert made["w8"].folder == tmp_path / "w8"
    assert (tmp_path / "comparison.json").is_file()
    report = json.loads(made["w4"].report.read_text(encoding="utf-8"))
    assert any("6 of the 6" in line for line in report["warnings"])
    assert 0 < made["w8"].float_wer < 90


SEQ2SEQ = f"""\
{small_recipes.FEATURES.replace("global", "sentence")}
{small_recipes.CONFORMER.replace("decoder_layers: 0", "decoder_layers: 1")}
seq_lin: !new:speechbrain.nnet.linear.Linear
    input_size: !ref <d_model>
    n_neurons: !ref <output_neurons>
tokenizer: !new:sentencepiece.SentencePieceProcessor
transformer_encoder: !new:{small_recipes.TRANSFORMER}.EncoderWrapper
    transformer: !ref <Transformer>
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    input_shape: [null, null, !ref <n_mels>]
    compute_features: !ref <compute_features>
    normalize: !ref <normalize>
    cnn: !ref <CNN>
    transformer_encoder: !ref <transformer_encoder>
decoder: !new:speechbrain.decoders.S2STransformerGreedySearcher
    modules: [!ref <Transformer>, !ref <seq_lin>]
    bos_index: 1
    eos_index: 2
    min_decode_ratio: 0.0
    max_decode_ratio: 0.5
asr_model: !new:torch.nn.ModuleList
    - [!ref <CNN>, !ref <Transformer>, !ref <seq_lin>]
modules:
    encoder: !ref <encoder>
    decoder: !ref <decoder>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        asr: !ref <asr_model>
        tokenizer: !ref <tokenizer>
"""


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory) -> Path:
    """A source of a Conformer with a decoder, and a manifest."""
    place = tmp_path_factory.mktemp("seq2seq")
    source = place / "source"
    source.mkdir()
    torch.manual_seed(3)
    asr = load_hyperpyyaml(SEQ2SEQ)["asr_model"]
    with torch.no_grad():
        asr[2].w.weight.mul_(30)
    torch.save(asr.state_dict(), source / "asr.ckpt")
    pieces = small_recipes.pieces(place)
    (source / "tokenizer.ckpt").write_bytes(pieces.serialized_model_proto())
    (source / "hyperparams.yaml").write_text(SEQ2SEQ, encoding="utf-8")
    write_manifest(place / "dev.csv", source, range(6), EncoderDecoderASR, "A")
    return place


def test_encoder_and_decoder(seq2seq, tmp_path):
    made = quantize_pretrained(
        seq2seq / "source",
        seq2seq / "dev.csv",
        tmp_path / "made",
        run_opts=RUN,
        calibration={"num_utterances": 2},
        search={"num_utterances": 3, "cutoffs": [100, 99.0]},
        weight_bits=4,
        activation_bits=4,
        backend="torch",
    )
    report = json.loads(made.report.read_text(encoding="utf-8"))
    assert not any("No inference" in x for x in report["warnings"])
    assert 0 < made.float_wer < 90
    plan = QuantizationPlan.load(made.folder / "plan.json")
    assert plan.search["rule"] == "divergence"
    names = {layer.name.split(".")[0] for layer in plan.layers}
    assert names == {"CNN", "Transformer", "seq_lin"}
    asr = EncoderDecoderASR.from_hparams(
        source=str(made.model), overrides={"backend": "torch"}
    )
    rows = json.loads(
        (made.folder / "transcripts_test.json").read_text(encoding="utf-8")
    )
    heard = {
        name: asr.transcribe_file(str(seq2seq / f"{name}.wav"))
        for name in ("u0", "u1", "u2", "u3", "u4", "u5")
    }
    known = {
        row["id"]: row["hypothesis"] for row in rows["content"]["transcripts"]
    }
    assert len(known) == 3
    for name, text in known.items():
        assert heard[name].split() == text.split(), name
    assert any(known.values())
