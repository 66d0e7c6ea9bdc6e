"""A recognizer loaded from data files alone."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import soundfile
import torch
from quantized_folder import HEADS, forget_spec, sign, write
from speechbrain.inference.ASR import EncoderASR
from torch import nn

import speechbrain_stablequant
from speechbrain_stablequant.folder import recognizer
from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.folder.recognizer_spec import read_spec
from speechbrain_stablequant.model.wrapper import StoredEncoder
from speechbrain_stablequant.transcribe.load import load

END = "================\n'starting_index' => 0\n"
SIMULATED = {"overrides": {"backend": "torch"}}


@pytest.fixture(scope="module")
def modules(make_tiny_modules):
    """A recognizer's modules."""
    torch.manual_seed(7)
    made = make_tiny_modules("wav2vec2-large")
    encoder = StoredEncoder(made["wav2vec2"].model, True, False).eval()
    with torch.no_grad():
        x = encoder(torch.randn(4, 9000), torch.ones(4))
        # So that no label is the likeliest of all frames of any noise.
        head = made["ctc_lin"]
        head.w.bias -= head(made["enc"](x)).mean((0, 1))
    return {**dict(made.items()), "wav2vec2": encoder}


@pytest.fixture(scope="module")
def made(modules, tmp_path_factory) -> Path:
    """Their folder."""
    folder = tmp_path_factory.mktemp("made") / "quantized"
    write(folder, modules)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy."""
    return Path(shutil.copytree(made, tmp_path / "quantized"))


@pytest.fixture(params=["recognizer.json", "hyperparams.yaml"])
def described(folder, request) -> Path:
    """A copy as it is written now, and as it was before."""
    if request.param == "hyperparams.yaml":
        forget_spec(folder)
    assert read_spec(folder)[1] == request.param
    return folder


def one_line(folder, **options) -> str:
    """The error of a folder: one line that names a file of it."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert str(folder) in text
    return text


def edit(path: Path, change) -> None:
    """Another content of a JSON file."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


# -- the same recognizer -----------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "torch_int8"])
def test_it_is_what_encoder_asr_loads(described, tmp_path, backend):
    expected = EncoderASR.from_hparams(
        source=str(described), overrides={"backend": backend}
    )
    found = speechbrain_stablequant.load(described, backend)
    wavs, lengths = torch.randn(3, 9000), torch.tensor([1.0, 0.5, 0.8])
    encoded = found.encode_batch(wavs, lengths)
    assert torch.equal(encoded, expected.encode_batch(wavs, lengths))
    assert not torch.equal(encoded[0], encoded[1])
    assert found.runtime == expected.mods.encoder.runtime == backend
    words, tokens = found.transcribe_batch(wavs, lengths)
    assert len(set(words)) == 3
    assert (words, tokens) == expected.transcribe_batch(wavs, lengths)
    # Stereo of another rate, as a file.
    audio = tmp_path / "speech.flac"
    soundfile.write(audio, 0.1 * torch.randn(30000, 2).numpy(), 44100)
    assert found.transcribe_file(audio) == expected.transcribe_file(str(audio))


def test_what_it_holds(folder, modules):
    found = load(folder)
    assert found.spec.blank_index == 0
    assert found.labels[:3] == ["<blank>", " ", "A"]
    assert list(found.model.parts) == ["wav2vec2", "enc", "ctc_lin"]
    assert set(found.plan.quants()) == set(found.model.integers())
    assert found.model.config["hidden_size"] == 32
    assert not any(p.is_meta for p in found.model.parameters())


def test_kinds_of_heads(folder, modules, tmp_path):
    """Containers, classes with settings, and plain modules."""
    heads = {
        "enc": "enc: !new:speechbrain.nnet.containers.Sequential\n"
        "  input_shape: [null, null, 32]\n"
        "  linear1: !name:speechbrain.nnet.linear.Linear\n"
        "    n_neurons: 24\n"
        "    bias: True\n"
        "  bn1: !name:speechbrain.nnet.normalization.BatchNorm1d\n"
        "  activation: !new:torch.nn.LeakyReLU\n"
        "  drop: !new:torch.nn.Dropout\n"
        "    p: 0.15\n",
        "ctc_lin": "ctc_lin: !new:torch.nn.Sequential\n"
        "  - !new:torch.nn.Linear\n"
        "    in_features: 24\n"
        "    out_features: 12\n"
        "  - !new:torch.nn.LogSoftmax\n"
        "    dim: -1\n",
    }
    from hyperpyyaml import load_hyperpyyaml

    made = {
        "wav2vec2": modules["wav2vec2"],
        **{k: load_hyperpyyaml(text)[k].eval() for k, text in heads.items()},
    }
    made["enc"].bn1.norm.running_mean.normal_()
    write(tmp_path / "other", made, heads)
    expected = EncoderASR.from_hparams(str(tmp_path / "other"), **SIMULATED)
    wavs, lengths = torch.randn(2, 9000), torch.ones(2)
    out = expected.encode_batch(wavs, lengths)
    for _ in range(2):
        found = load(tmp_path / "other", "torch")
        assert repr(found.model.parts["enc"]) == repr(
            expected.mods.encoder.parts["enc"]
        )
        assert torch.equal(found.encode_batch(wavs, lengths), out)
        if (tmp_path / "other/recognizer.json").exists():
            forget_spec(tmp_path / "other")


def test_sentencepiece(modules, tmp_path):
    words = " ".join(
        f"AB CD{'EF' * (i % 3)} GH{i % 2 * 'IJ'}" for i in range(9)
    )
    (tmp_path / "text").write_text("\n".join([words] * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "pieces"),
        vocab_size=12,
        model_type="char",
        bos_id=-1,
        eos_id=-1,
        hard_vocab_limit=False,
    )
    write(
        tmp_path / "other",
        modules,
        tokenizer_class="sentencepiece.SentencePieceProcessor",
        tokenizer_file="tokenizer.model",
        tokenizer=(tmp_path / "pieces.model").read_bytes(),
    )
    expected = EncoderASR.from_hparams(str(tmp_path / "other"), **SIMULATED)
    found = load(tmp_path / "other", "torch")
    wavs, lengths = torch.randn(2, 9000), torch.ones(2)
    words, _ = found.transcribe_batch(wavs)
    assert words == expected.transcribe_batch(wavs, lengths)[0]
    assert any(words)
    path = tmp_path / "other" / "tokenizer.model"
    path.write_bytes(b"no model at all")
    sign(tmp_path / "other")
    assert "holds no SentencePiece model (" in one_line(tmp_path / "other")


# -- nothing is executed -----------------------------------------------------


def spoil(folder: Path, canary: Path) -> None:
    """YAML that writes a file when it is executed."""
    yaml = folder / "hyperparams.yaml"
    text = yaml.read_text(encoding="utf-8")
    yaml.write_text(f"{text}\nspoil: !apply:os.mkdir [{canary}]\n", "utf-8")


def test_no_tag_is_executed(described, tmp_path):
    spoil(described, tmp_path / "canary")
    sign(described)
    wavs = torch.randn(1, 9000)
    words, _ = load(described, "torch").transcribe_batch(wavs)
    assert not (tmp_path / "canary").exists()
    # It would have been.
    asr = EncoderASR.from_hparams(str(described), **SIMULATED)
    assert (tmp_path / "canary").is_dir()
    assert words == asr.transcribe_batch(wavs, torch.ones(1))[0]


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "!new:speechbrain.nnet.linear.Linear",
            "!apply:os.mkdir",
            "heads.ctc_lin: is no module but",
        ),
        (
            "!new:speechbrain.nnet.linear.Linear",
            "!new:subprocess.Popen",
            "heads.ctc_lin: subprocess.Popen is none of the kinds",
        ),
        (
            "!name:torch.nn.LeakyReLU",
            "!name:os.getcwd",
            "heads.enc.activation: os.getcwd is none of the kinds",
        ),
        (
            "!name:speechbrain.decoders.ctc_greedy_decode",
            "!name:os.mkdir",
            "decoding_function: must be !name:speechbrain.decoders",
        ),
        ("blank_id: !ref <blank_index>", "blank_id: 5", "must be !ref <blank"),
        (
            "!new:speechbrain.dataio.encoder.CTCTextEncoder",
            "!new:my.Tokenizer",
            "tokenizer: cannot be Tagged(tag='new:my.Tokenizer'",
        ),
        ("input_size: 24", "device: cuda", "device: a file may not set it"),
        ("dnn_blocks: 2", "dnn_blocks: 100000", "dnn_blocks: cannot be 100000"),
        ("n_neurons: 12", "n_neurons: 99999999", "n_neurons: cannot be"),
        ("n_neurons: 12", "n_neurons: [1, 2]", "does not take its settings"),
        ("n_neurons: 12", "neurons: 12", "an unexpected keyword argument"),
        ("n_neurons: 12", "n_neurons: !ref <n>", "n_neurons: is no module"),
        (
            "\nsample_rate: 16000",
            "\nsample_rate: 0",
            "sample_rate: must be from 1 to 1000000, not 0",
        ),
        ("label_encoder.txt", "../labels.txt", "is not the plain name of a"),
        ("key", "kay", "unknown key"),
        ("checksum", "check", "checksum: must be str, not None"),
        ("backend: auto", "backend: tpu", "backend: 'tpu' is none of auto"),
    ],
)
def test_yaml_that_is_more_than_data(folder, old, new, message):
    forget_spec(folder)
    yaml = folder / "hyperparams.yaml"
    text = yaml.read_text(encoding="utf-8")
    assert old in text
    yaml.write_text(text.replace(old, new), "utf-8")
    assert message in one_line(folder)


def test_a_backend_of_a_later_version(folder):
    forget_spec(folder)
    yaml = folder / "hyperparams.yaml"
    text = yaml.read_text(encoding="utf-8")
    yaml.write_text(text.replace("backend: auto", "backend: tpu"), "utf-8")
    assert load(folder, "torch").model.backend == "torch"


def test_options_of_the_folder_s_own_backend(folder):
    edit(
        folder / "recognizer.json",
        lambda raw: raw.update(
            backend="torch_int8", backend_options={"threads": 1}
        ),
    )
    sign(folder)
    assert load(folder, "torch").model.options == {}
    assert load(folder, "openvino").model.options == {"threads": 1}


def test_a_head_of_another_kind(folder):
    """The folder can be loaded as before, by who trusts it."""
    edit(
        folder / "recognizer.json",
        lambda raw: raw["heads"][0].update(new="my.code.Head"),
    )
    sign(folder)
    text = one_line(folder)
    assert "recognizer.json: heads.enc: my.code.Head is none of" in text
    assert "EncoderASR.from_hparams, which runs the code" in text


def test_a_recipe_with_a_head_of_its_own(modules, tmp_path, caplog):
    heads = {**HEADS, "act": "act: !new:torch.nn.Hardswish\n"}
    write(tmp_path / "other", {**modules, "act": nn.Hardswish()}, heads=heads)
    assert "EncoderASR does: heads.act: torch.nn.Hardswish" in caplog.text
    assert not (tmp_path / "other/recognizer.json").exists()
    assert EncoderASR.from_hparams(str(tmp_path / "other"), **SIMULATED)
    assert "torch.nn.Hardswish is none of" in one_line(tmp_path / "other")


# -- damaged, mixed up, or made up -------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw.update(format=2), "its format is not 1"),
        (lambda raw: raw.pop("heads"), "heads: must be a list, not None"),
        (lambda raw: raw["heads"].append(raw["heads"][0]), "the key 'enc'"),
        (lambda raw: raw["heads"][0].update(key="a.b"), "the key 'a.b'"),
        (lambda raw: raw["heads"][0].update(key="keys"), "the key 'keys'"),
        (lambda raw: raw["heads"][0].update(x=1), "heads.enc: is no module"),
        (lambda raw: raw.update(tokenizer="bpe"), "tokenizer: must be one of"),
        (
            lambda raw: raw.update(blank_index=10**9),
            "blank_index: must be an",
        ),
        (lambda raw: raw.update(blank_index=None), "blank_index: must be int"),
        (lambda raw: raw["encoder"].pop("key"), "encoder: lacks 'key'"),
        (lambda raw: raw["encoder"].update(key="enc"), "the key 'enc'"),
        (lambda raw: raw.update(more=1), "more: unknown key"),
        (lambda raw: raw.update(tokenizer_file="/etc/x"), "the plain name"),
    ],
)
def test_impossible_descriptions(folder, change, message):
    edit(folder / "recognizer.json", change)
    sign(folder)
    text = one_line(folder)
    assert "recognizer.json: describes no recognizer" in text
    assert message in text


@pytest.mark.parametrize(
    "name", ["recognizer.json", "config.json", "label_encoder.txt", "plan.json"]
)
def test_files_must_be_signed(folder, name):
    """Who leaves a file out of the list could exchange it."""
    sign(folder, lambda about, _: about["files"].pop(name))
    assert f"does not list {name} among its files" in one_line(folder)
    if name != "recognizer.json":
        with pytest.raises(CheckpointError, match="does not list"):
            EncoderASR.from_hparams(str(folder), **SIMULATED)


@pytest.mark.parametrize(
    "name", ["recognizer.json", "config.json", "label_encoder.txt", "plan.json"]
)
def test_edited_files(folder, name):
    path = folder / name
    path.write_text(path.read_text("utf-8") + "\n", "utf-8")
    assert f"{name}: is not the file that" in one_line(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "bert"}, "model_type: 'bert' is none of wav2vec2"),
        ({"model_type": ["a"]}, "model_type: ['a'] is none of"),
        ({"hidden_size": "32"}, "hidden_size: must be int, not '32'"),
        ({"hidden_size": 33}, "num_attention_heads: cannot be 2"),
        ({"hidden_size": 64}, "belong to different models"),
        ({"num_hidden_layers": 10**9}, "cannot be 1000000000"),
        ({"num_hidden_layers": 10**4}, "10000 layers are more than the file"),
        ({"conv_dim": [16] * 6}, "conv_kernel: cannot be"),
        ({"conv_dim": 16}, "conv_dim: must be a list of int, not 16"),
        ({"conv_stride": [0] * 7}, "conv_stride: cannot be [0, 0, 0"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps: cannot be -1.0"),
        ({"num_conv_pos_embeddings": 0}, "num_conv_pos_embeddings: cannot"),
        ({"mask_time_prob": True}, "mask_time_prob: must be float, not True"),
        ({"hidden_act": "no such"}, "transformers cannot make the wav2vec2"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_impossible_configurations(folder, changes, message, backend):
    edit(folder / "config.json", lambda raw: raw.update(changes))
    sign(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder, backend)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert message in text


def test_code_that_a_configuration_names(folder, monkeypatch):
    """transformers would fetch an attention kernel by its name."""
    edit(
        folder / "config.json",
        lambda raw: raw.update(
            _attn_implementation="somebody/kernel",
            attn_implementation="somebody/kernel",
            auto_map={"AutoModel": "somebody--model"},
            quantization_config={"quant_method": "awq"},
        ),
    )
    sign(folder)
    taken = []
    original = recognizer.empty_encoder
    monkeypatch.setattr(
        recognizer, "empty_encoder", lambda c: taken.append(c) or original(c)
    )
    load(folder, "torch").transcribe_batch(torch.randn(1, 9000))
    text = json.dumps(taken)
    assert taken and "somebody" not in text and "awq" not in text


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "KeyError: 'starting_index'"),
        (END, "it has no labels"),
        (f"'A' => 0\n'B' => 0\n{END}", "two of one index"),
        ("'A'\n", "not enough values to unpack"),
        (f"'A' => -1\n{END}", "label 'A' has index -1"),
        (f"7 => 0\n{END}", "label 0: must be str, not 7"),
        ("[] => 0\n", "unhashable"),
        ("__import__('os') => 0\n", "malformed node or string"),
        ("(" * 1500 + " => 0\n", "holds no labels"),
        (f"'A' => 0{' ' * 3000}\n", "a line of it is too long"),
        (f"'\\ud800' => 0\n{END}", "surrogates not allowed"),
        (f"'A' => 0\n{END}'blank_label' => 'B'\n", "'B' is none of its labels"),
        (f"'A' => 0\n{END}'starting_index' => 'a'\n", "starting_index: must"),
    ],
)
def test_impossible_labels(folder, text, message):
    (folder / "label_encoder.txt").write_text(text, "utf-8")
    sign(folder)
    found = one_line(folder)
    assert "label_encoder.txt: holds no labels (" in found
    assert message in found
    with pytest.raises(CheckpointError, match=r"label_encoder\.txt: holds no"):
        EncoderASR.from_hparams(str(folder), **SIMULATED)


def test_an_output_without_a_label(folder):
    (folder / "label_encoder.txt").write_text(
        f"'<blank>' => 0\n{END}'blank_label' => '<blank>'\n", "utf-8"
    )
    sign(folder)
    with pytest.raises(ValueError, match=r"label_encoder\.txt has no label"):
        load(folder, "torch").transcribe_batch(torch.randn(1, 9000))


def test_no_folder(tmp_path):
    assert "there is no such folder" in one_line(tmp_path / "none")
    assert "holds no quantized recognizer" in one_line(tmp_path)


def test_backends_and_options(folder):
    with pytest.raises(ValueError, match="backend: 'tpu' is none of auto, "):
        load(folder, "tpu")
    with pytest.raises(ValueError, match=r"backend_options\.thread: unknown"):
        load(folder, "torch_int8", backend_options={"thread": 1})
    with pytest.raises(ValueError, match="device: xpu:7: "):
        load(folder, device="xpu:7")
    found = load(folder, "torch_int8", backend_options={"threads": 1})
    assert found.model.options == {"threads": 1}


# -- audio -------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["torch", "torch_int8"])
def test_audio_that_is_no_number(folder, value, backend):
    wavs = torch.randn(3, 9000)
    wavs[1, 77] = value
    asr = EncoderASR.from_hparams(str(folder), overrides={"backend": backend})
    for found in (load(folder, backend), asr):
        with pytest.raises(ValueError, match="audio: row 1 of the batch holds"):
            found.transcribe_batch(wavs, torch.ones(3))


def test_audio_files_that_cannot_be_transcribed(folder, tmp_path):
    found = load(folder, "torch")
    path = tmp_path / "odd.wav"
    with pytest.raises(ValueError, match=r"odd\.wav: there is no such audio"):
        found.transcribe_file(path)
    path.write_bytes(b"RIFF" + b"\0" * 40)
    with pytest.raises(ValueError, match=r"odd\.wav: cannot be read as audio"):
        found.transcribe_file(path)
    soundfile.write(path, torch.zeros(0).numpy(), 16000)
    with pytest.raises(ValueError, match=r"odd\.wav: audio of 0 samples; "):
        found.transcribe_file(path)
    # Resampling would fail.
    soundfile.write(path, torch.zeros(0, 2).numpy(), 44100)
    with pytest.raises(ValueError, match=r"odd\.wav: audio of 0 samples; "):
        found.transcribe_file(path)
    soundfile.write(path, torch.zeros(300).numpy(), 16000)
    with pytest.raises(ValueError, match=r"odd\.wav: audio of 300 samples is"):
        found.transcribe_file(path)
    soundfile.write(path, torch.zeros(30000).numpy(), 999983)
    with pytest.raises(ValueError, match=r"odd\.wav: audio of 999983 Hz"):
        found.transcribe_file(path)
    loud = torch.zeros(9000)
    loud[5] = float("nan")
    soundfile.write(path, loud.numpy(), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"odd\.wav: audio: row 0 of the ba"):
        found.transcribe_file(path)
    with pytest.raises(ValueError, match=r"\[batch, samples\] and \[batch\]"):
        found.transcribe_batch(torch.randn(9000))
    with pytest.raises(ValueError, match=r"shape \[0, 9000\]"):
        found.transcribe_batch(torch.randn(0, 9000))


def test_a_file_that_does_not_tell_its_length(folder, tmp_path):
    """Its windows, up to the largest number, would take all memory."""
    found, path = load(folder, "torch"), tmp_path / "piped.flac"
    soundfile.write(path, 0.1 * torch.randn(9000).numpy(), 16000)
    content = bytearray(path.read_bytes())
    # The number of samples in STREAMINFO, 36 bits; 0: unknown.
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    for recognize in (found.transcribe_file, lambda x: list(found.words(x))):
        with pytest.raises(ValueError, match=r"piped\.flac: its header does"):
            recognize(path)


def test_a_fault_of_the_runtime_is_not_blamed_on_the_audio(folder, tmp_path):
    found, path = load(folder, "torch"), tmp_path / "good.wav"
    soundfile.write(path, 0.1 * torch.randn(9000).numpy(), 16000)

    def fail(*_):
        raise RuntimeError("out of\nmemory")

    found.model.forward = fail
    for recognize in (found.transcribe_file, lambda x: list(found.words(x))):
        with pytest.raises(ValueError, match="good") as caught:
            recognize(path)
        line = f"{path}: cannot be transcribed (out of memory)"
        assert str(caught.value) == line
