"""The folder of a run, loaded as its user loads it: elsewhere and offline."""

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from speechbrain.inference.ASR import EncoderASR
from starter import environment
from torch import nn
from trained_recipe import RECIPE

from speechbrain_stablequant.core.error_rates import Transcript, score
from speechbrain_stablequant.folder import recognizer as recognizer_module
from speechbrain_stablequant.folder import runtime_slot
from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.folder.stored_floats import rounded_floats
from speechbrain_stablequant.folder.weights_file import load_checkpoint
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.runtimes.choice import choose_backend
from speechbrain_stablequant.utils.patching import shadowed_forwards

BLOCK = """
quantize: !apply:speechbrain_stablequant.register
    target: [wav2vec2, enc, ctc_lin]
    weight_bits: 8
    activation_bits: 8
    method: max
    calibration: {num_utterances: 6}
    backend: torch
"""
#: Each frame's best label alone, so that the recipe's beam search decodes as
#: the folder, whatever the model has learned.
GREEDY = ("--beam", "{token_prune_min_logp: 0.0}")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIMULATED = {"overrides": {"backend": "torch"}}

FOUR_LINES = """\
from speechbrain.inference.ASR import EncoderASR
asr = EncoderASR.from_hparams(source={folder!r})
text = asr.transcribe_file({audio!r})
print(text)
"""


def recipe_script():
    """The recipe's ``train.py`` as a module."""
    spec = importlib.util.spec_from_file_location(
        "recipe_of_inference", RECIPE / "train.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(trained) -> Path:
    """The output folder of a run of eight bits."""
    output = trained.root / "for_inference"
    finished = trained.run(output, *GREEDY, block=BLOCK)
    assert finished.code == 0, finished.err
    return output


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy of its quantized folder."""
    return Path(shutil.copytree(written / "quantized/model", tmp_path / "copy"))


@pytest.fixture(scope="module")
def brain(trained, written):
    """The recipe's float Brain with its best checkpoint."""
    script = recipe_script()
    output = trained.root / "brain"
    arguments = trained.test_arguments(output, block="")
    brain, sets, _ = script.prepare([str(part) for part in arguments])
    brain.checkpointer.recover_if_possible(min_key="WER")
    brain.modules.eval()
    return brain, sets


def audio_files(trained, name: str = "clean") -> list[Path]:
    """Audio of a test set."""
    files = sorted((trained.root / "corpus").glob(f"{name}-*.wav"))
    assert files
    return files


def load(folder: Path, **options) -> EncoderASR:
    """The recognizer, simulated unless options say otherwise."""
    return EncoderASR.from_hparams(
        source=str(folder), **{**SIMULATED, **options}
    )


def padded(files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of audio files, and relative lengths."""
    waves = [
        torch.from_numpy(soundfile.read(f, dtype="float32")[0]) for f in files
    ]
    longest = max(len(wave) for wave in waves)
    lengths = torch.tensor([len(wave) / longest for wave in waves])
    return nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths


# -- what is written -----------------------------------------------------------


def test_files_of_the_folder(written):
    folder = written / "quantized/model"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "plan.json",
        "hyperparams.yaml",
        "recognizer.json",
        "config.json",
        "label_encoder.txt",
        "README.md",
    }
    run = folder.parent
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    size = (folder / "model.safetensors").stat().st_size
    assert report["size_mb"]["quantized"] == size / 1e6
    assert report["backend"] == "simulated"
    assert report["warnings"] == []
    assert set(report["files"].values()) == {
        "model/model.safetensors",
        "plan.json",
        "model/hyperparams.yaml",
    }
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "all else as float16, as it was evaluated" in text


def test_no_path_of_the_training_machine(trained, written):
    root = str(trained.root)
    folder = written / "quantized/model"
    for name in ("hyperparams.yaml", "config.json", "README.md"):
        assert root not in (folder / name).read_text(encoding="utf-8")
    assert root.encode() not in (folder / "model.safetensors").read_bytes()


def test_no_float_weight_of_a_quantized_layer(written):
    folder = written / "quantized/model"
    tensors = load_file(folder / "model.safetensors")
    layers = load_checkpoint(folder).integers
    assert "ctc_lin.w" in layers and len(layers) > 10
    for name in layers:
        assert tensors[f"{name}.weight"].dtype == torch.int8, name
    assert not any("original" in name for name in tensors)


# -- what it computes ----------------------------------------------------------


@torch.no_grad()
def simulated_output(brain, folder, wavs, lengths):
    """Log probabilities of the recipe's own modules with the plan."""
    checkpoint = load_checkpoint(folder)
    modules = dict(brain.modules.items())
    integers = checkpoint.integers
    forwards = build_forwards("torch", modules, integers)
    with (
        rounded_floats(modules, list(integers), "float16"),
        shadowed_forwards(forwards),
    ):
        hidden = modules["enc"](modules["wav2vec2"](wavs, lengths))
        return brain.hparams.log_softmax(modules["ctc_lin"](hidden))


def test_output_is_that_of_the_recipe(trained, folder, brain):
    wavs, lengths = padded(audio_files(trained))
    assert lengths.min() < 1
    expected = simulated_output(brain[0], folder, wavs, lengths)
    asr = load(folder)
    assert torch.equal(asr.encode_batch(wavs, lengths), expected)
    assert asr.mods.encoder.runtime == "torch"


def test_output_is_close_to_the_float_model(trained, folder, brain):
    wavs, lengths = padded(audio_files(trained))
    modules = brain[0].modules
    with torch.no_grad():
        hidden = modules.enc(modules.wav2vec2(wavs, lengths))
        expected = modules.ctc_lin(hidden).log_softmax(-1).exp()
    found = load(folder).encode_batch(wavs, lengths).exp()
    assert (found - expected).abs().mean() < 0.02
    assert not torch.equal(found, expected)


def test_transcribe_file_and_batch(trained, folder, brain):
    files = audio_files(trained) + audio_files(trained, "noisy")
    asr = load(folder)
    one_by_one = [asr.transcribe_file(str(file)) for file in files]
    assert len(set(one_by_one)) > 1
    references = {
        item["id"]: item["wrd"]
        for name in ("clean", "noisy")
        for item in brain[1][name]
    }
    right = sum(
        text == references[file.stem]
        for text, file in zip(one_by_one, files, strict=True)
    )
    # A system that recognizes: most sentences are right as a whole.
    assert right >= len(files) / 2
    for file, text in zip(files, one_by_one, strict=True):
        words, tokens = asr.transcribe_batch(*padded([file]))
        assert words == [text]
        assert len(tokens[0]) == len(text)
    words, _ = asr.transcribe_batch(*padded(files))
    assert len(words) == len(files)


def test_four_lines_elsewhere_and_offline(trained, folder, tmp_path):
    """No argument; the recipe, its checkpoint and its data are gone."""
    audio = tmp_path / "speech.flac"
    data, rate = soundfile.read(audio_files(trained)[0])
    soundfile.write(audio, data, rate)
    script = tmp_path / "four.py"
    script.write_text(
        FOUR_LINES.format(folder=str(folder), audio=str(audio)),
        encoding="utf-8",
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    gone = trained.root.with_name(trained.root.name + "-gone")
    trained.root.rename(gone)
    try:
        finished = trained.starter.run(script, cwd=empty)
    finally:
        gone.rename(trained.root)
    assert finished.code == 0, finished.err
    text = finished.out.strip().splitlines()[-1]
    assert text == load(folder, overrides={}).transcribe_file(str(audio))
    # Nothing is left where it ran.
    assert not list(empty.iterdir())


def test_error_rates_of_a_folder(
    trained, folder, written, tmp_path, monkeypatch
):
    """The benchmark that compares runtimes counts what they transcribe."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import wer

    files = audio_files(trained)
    asr = load(folder)
    said = {file.stem: asr.transcribe_file(str(file)) for file in files}
    # one wrong word in each of the first three, if they are recognized alike
    words = {name: text or "NOTHING" for name, text in said.items()}
    for file in files[:3]:
        words[file.stem] += " WRONG"
    known = score([Transcript(n, words[n], said[n]) for n in words])
    chapter = tmp_path / "split" / "1" / "2"
    chapter.mkdir(parents=True)
    for file in files:
        soundfile.write(chapter / f"{file.stem}.flac", *soundfile.read(file))
    lines = [f"{key} {text}\n" for key, text in words.items()]
    (chapter / "1-2.trans.txt").write_text("".join(lines))
    rows = wer.main(
        [
            *(str(folder), "--split", str(tmp_path / "split")),
            *("--backends", "torch", "torch_int8", "--batches", "1", "3"),
            *("--json", str(tmp_path / "rows.json")),
        ]
    )
    assert rows == json.loads((tmp_path / "rows.json").read_text())
    assert [(r["runtime"], r["batch"]) for r in rows] == [
        (name, size) for name in ("torch", "torch_int8") for size in (1, 3)
    ]
    assert rows[0]["wer"] == pytest.approx(known.wer, abs=1e-3)
    assert known.wer > 0
    assert rows[0]["delta"] == rows[0]["low"] == rows[0]["high"] == 0
    for row in rows[1:]:
        expected = row["wer"] - rows[0]["wer"]
        assert row["delta"] == pytest.approx(expected, abs=2e-3)
    with pytest.raises(SystemExit, match=r"no \*.trans.txt below it"):
        wer.main([str(folder), "--split", str(written / "save")])


def test_runtime_of_the_device(trained, folder):
    asr = load(folder, overrides={})
    wavs, lengths = padded(audio_files(trained)[:1])
    out = asr.encode_batch(wavs, lengths)
    chosen, _ = choose_backend("auto", "cpu")
    assert asr.mods.encoder.runtime == chosen != "torch"
    expected = load(folder).encode_batch(wavs, lengths)
    assert (out.exp() - expected.exp()).abs().mean() < 0.02


LIGHT = """\
import sys
from speechbrain.inference.ASR import EncoderASR
asr = EncoderASR.from_hparams(
    source={folder!r}, overrides={{"backend": {backend!r}}})
text = asr.transcribe_file({audio!r})
heavy = ("transformers", "sympy", "torch._dynamo", "triton", "openvino")
print(asr.mods.encoder.runtime, [m for m in heavy if m in sys.modules], text)
"""


def test_transcribing_imports_little(trained, folder, tmp_path):
    """Neither transformers nor torch's compiler nor what else takes memory;
    in a process of its own, since this one has all of them."""
    audio = str(audio_files(trained)[0])
    script = LIGHT.format(folder=str(folder), backend="torch_int8", audio=audio)
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    expected = load(folder, overrides={"backend": "torch_int8"})
    text = expected.transcribe_file(audio)
    assert text and text.split()
    line = finished.stdout.strip().splitlines()[-1]
    assert line == f"torch_int8 [] {text}"


def test_code_is_fetched_where_it_is_needed(trained, folder, monkeypatch):
    """`auto` on a device without an integer runtime computes by simulation,
    and that needs the code of the model."""
    wavs, lengths = padded(audio_files(trained))
    asr = load(folder, overrides={})
    encoder = asr.mods.encoder.parts["wav2vec2"]
    assert isinstance(encoder, recognizer_module.RuntimeEncoder)
    monkeypatch.setattr(runtime_slot, "candidates", lambda *_: ["torch"])
    out = asr.encode_batch(wavs, lengths)
    assert asr.mods.encoder.runtime == "torch"
    assert next(iter(asr.mods.encoder.parts)) == "wav2vec2"
    assert torch.equal(out, load(folder).encode_batch(wavs, lengths))


@pytest.mark.parametrize("backend", ["torch", "torch_int8"])
@pytest.mark.parametrize("used", [False, True])
def test_a_deep_copy(trained, folder, backend, used):
    """It has its own weights and runtime, and leaves the original as it is."""
    wavs, lengths = padded(audio_files(trained))
    asr = load(folder, overrides={"backend": backend})
    expected = load(folder, overrides={"backend": backend}).encode_batch(
        wavs, lengths
    )
    if used:
        assert torch.equal(asr.encode_batch(wavs, lengths), expected)
    twin = copy.deepcopy(asr)
    assert twin.mods.encoder.runtime is None
    for one, two in zip(
        asr.mods.parameters(), twin.mods.parameters(), strict=True
    ):
        assert one is not two
    for recognizer in (asr, twin):
        assert torch.equal(recognizer.encode_batch(wavs, lengths), expected)
    forwards = [
        vars(module)["forward"]
        for recognizer in (asr, twin)
        for module in recognizer.mods.modules()
        if "forward" in vars(module)
    ]
    assert len(set(map(id, forwards))) == len(forwards) > 0


def test_a_layer_without_a_right_way(
    trained, folder, monkeypatch, tmp_path, caplog
):
    """By ``auto`` the next runtime computes, after one line; a backend that
    was named is an error."""
    trial = pytest.importorskip(
        "speechbrain_stablequant.runtimes.openvino_.layer_runner"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = trial.OpenVINORunner.run

    def wrong(runner, geometry, given):
        found = run(runner, geometry, given)
        for values in found.values if geometry.place == "position" else ():
            values[:, :, -1] *= 2
        return found

    monkeypatch.setattr(trial.OpenVINORunner, "run", wrong)
    wavs, lengths = padded(audio_files(trained)[:1])
    asr = load(folder, overrides={"backend": "openvino"})
    line = r"^backend: openvino computes wav2vec2\.\S*pos_conv\S* wrongly on"
    with pytest.raises(ValueError, match=line) as raised:
        asr.mods.encoder(wavs, lengths)
    assert len(str(raised.value).splitlines()) == 1
    asr = load(folder, overrides={"backend": "auto"})
    out = asr.mods.encoder(wavs, lengths)
    assert asr.mods.encoder.runtime == "torch_int8"
    (line,) = (x for x in caplog.messages if "wrongly" in x)
    assert line.startswith("backend auto: openvino is not used")
    asr = load(folder, overrides={"backend": "torch_int8"})
    assert torch.equal(asr.mods.encoder(wavs, lengths), out)


def test_an_unknown_backend(folder):
    with pytest.raises(ValueError, match=r"^backend: 'tpu' is none of auto"):
        load(folder, overrides={"backend": "tpu"})


def test_an_unknown_option(folder):
    options = {"backend_options": {"thread": 1}}
    with pytest.raises(ValueError, match=r"^backend_options.thread: unknown"):
        load(folder, overrides=options)


def test_weights_never_are_floats(folder, monkeypatch):
    """Nothing of the size of a quantized weight is made on a device."""
    shells = []

    def keep(config):
        shells.append(original(config))
        # One vector of transformers' is made by a way that knows no device.
        stored = {n for n, p in shells[-1].named_parameters() if not p.is_meta}
        assert stored <= {"masked_spec_embed"}
        return shells[-1]

    original = recognizer_module.empty_encoder
    monkeypatch.setattr(recognizer_module, "empty_encoder", keep)
    asr = load(folder)
    (shell,) = shells
    linears = [m for m in shell.modules() if isinstance(m, nn.Linear)]
    assert linears
    assert all(m.weight is None for m in linears)
    conv = shell.encoder.pos_conv_embed.conv
    assert conv.weight is None
    assert not hasattr(conv, "parametrizations")
    assert asr.mods.encoder.parts["ctc_lin"].w.weight is None
    assert not any(p.is_meta for p in asr.mods.parameters())


def test_stays_in_evaluation_mode(folder):
    asr = load(folder, freeze_params=False)
    asr.train()
    assert not any(module.training for module in asr.mods.encoder.modules())


# -- where it is ---------------------------------------------------------------


def test_relative_source(trained, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    asr = load(Path(folder.name))
    monkeypatch.chdir("/")
    assert asr.transcribe_file(str(audio_files(trained)[0]))


def test_savedir_of_another_model(trained, written, folder, tmp_path):
    """SpeechBrain takes hyperparams.yaml from savedir if there is one."""
    savedir = tmp_path / "saved"
    assert load(folder, savedir=str(savedir))
    # The same once more is fine.
    assert load(folder, savedir=str(savedir))
    output = trained.root / "six_bits"
    if not output.exists():
        finished = trained.run(
            output, "--quantize", "{weight_bits: 6}", block=BLOCK
        )
        assert finished.code == 0, finished.err
    with pytest.raises(CheckpointError, match="give from_hparams no savedir"):
        load(output / "quantized/model", savedir=str(savedir))
    # And with links that lead nowhere the new one is found.
    shutil.rmtree(folder)
    asr = load(output / "quantized/model", savedir=str(savedir))
    assert asr.mods.encoder.folder == (output / "quantized/model").absolute()


# -- folders that were damaged or mixed up -------------------------------------


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "plan.json", "config.json", "label_encoder.txt"],
)
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    assert f"{name}: there is no such file" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "name", ["plan.json", "config.json", "label_encoder.txt"]
)
def test_edited_file(folder, name):
    path = folder / name
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{name}: is not the file that"):
        load(folder)


def test_checksum_of_hyperparams(folder):
    path = folder / "hyperparams.yaml"
    text = path.read_text(encoding="utf-8")
    checksum = load_checkpoint(folder).checksum
    path.write_text(text.replace(checksum, "0" * 64), encoding="utf-8")
    with pytest.raises(CheckpointError, match="not the model that hyperparams"):
        load(folder)


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("n_neurons: 6", "n_neurons: 7", r"layer 'ctc_lin\.w' of shape"),
        (
            '"label_encoder.txt"',
            '"../label_encoder.txt"',
            r"does not list \.\./label_enc",
        ),
    ],
)
def test_hyperparams_of_another_model(folder, old, new, complaint):
    path = folder / "hyperparams.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(CheckpointError, match=complaint):
        load(folder)


def test_nothing_is_unpickled(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(sys.modules["pickle"], "load", refuse)
    assert load(folder)
