"""A Brain's own evaluation writes a folder that SpeechBrain's class loads."""

import copy
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import small_recipes as recipes
import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.inference.ASR import EncoderDecoderASR

from speechbrain_stablequant import StableQuant, load
from speechbrain_stablequant.cli.app import main
from speechbrain_stablequant.export import export_for
from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.transcribe.modules import ModulesRecognizer


def utterances(folder, count=2):
    """A data set of noise, each file of another length."""
    rows = {}
    for i in range(count):
        torch.manual_seed(i)
        path = folder / f"{i}.wav"
        wave = 0.1 * torch.randn(9600 + 1600 * i)
        soundfile.write(path, wave.numpy(), 16000)
        rows[str(i)] = {"wav": str(path), "wrd": "A B", "duration": 1.0}
    data = DynamicItemDataset(rows)
    read = sb.dataio.dataio.read_audio
    data.add_dynamic_item(read, takes="wav", provides="sig")
    data.set_output_keys(["id", "sig", "wrd"])
    return data


class Seq2Seq(recipes.Seq2Seq):
    """Reads batches of data loaders, and has no checkpoint."""

    def on_evaluate_start(self, max_key=None, min_key=None):
        pass


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The run of an evaluation, and its data."""
    place = tmp_path_factory.mktemp("evaluated")
    text = recipes.FEATURES + recipes.SEQ2SEQ_RECIPE
    brain = recipes.make(Seq2Seq, text, place)
    data = utterances(place)
    quantizer = StableQuant.attach(
        brain,
        valid_set=data,
        target=["CNN", "Transformer", "seq_lin", "ctc_lin"],
        method="max",
        calibration={"num_utterances": 2},
        search={"max_float_wer": 1000},
        backend="torch",
        output_folder=str(place / "quantized"),
    )
    brain.evaluate(data, test_loader_kwargs={"batch_size": 1})
    (run,) = quantizer.runs
    return run, data


def test_the_folder_transcribes_as_the_evaluation_did(evaluated):
    run, data = evaluated
    transcripts = run.results["test"].quantized.transcripts
    # The weights are random.
    (warning,) = run.warnings
    assert "recognizes next to nothing of test set 'test'" in warning
    assert list(run.extras) == ["lm_model"]
    report = json.loads((run.folder / "report.json").read_text())
    assert "recognizer, for EncoderDecoderASR" in report["files"]
    asr = EncoderDecoderASR.from_hparams(
        source=run.model_folder, overrides={"backend": "torch"}
    )
    heard = [asr.transcribe_file(row["wav"]) for row in data.data.values()]
    assert all(heard)
    assert heard == [x.hypothesis for x in transcripts]
    # By any thread.
    found = load(run.folder, "torch", trust_source=True)
    files = [row["wav"] for row in data.data.values()]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(found.transcribe_file, files * 4)) == heard * 4
    twin = copy.deepcopy(found)
    assert twin.transcribe_file(files[0]) == heard[0]
    assert twin.model is not found.model
    assert found.runtime == "torch"
    assert found.plan.quants().keys() == run.plan.quants().keys()


def test_it_is_made_by_code(evaluated, tmp_path):
    run, _ = evaluated
    with pytest.raises(CheckpointError, match="trust_source=True") as caught:
        load(run.folder)
    assert str(run.model_folder) in str(caught.value)
    folder = shutil.copytree(run.model_folder, tmp_path / "model")
    path = folder / "hyperparams.yaml"
    text = path.read_text(encoding="utf-8")
    for before, after, line in (
        ("num_blocks", "blocks", "cannot be made"),
        ("\nsample_rate: 16000", "\nsample_rate: x", "cannot be made"),
        ("  decoder:", "  decoded:", "none of SpeechBrain's classes"),
    ):
        assert before in text
        path.write_text(text.replace(before, after), encoding="utf-8")
        with pytest.raises(CheckpointError, match=line) as caught:
            load(folder, trust_source=True)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"backend": "nope"}, "nope"),
        ({"backend": "torch", "backend_options": {"x": 1}}, "options.x: "),
        ({"device": "nonsense"}, "device: "),
    ],
)
def test_wrong_arguments_do_not_blame_the_folder(evaluated, options, line):
    run, _ = evaluated
    with pytest.raises(ValueError, match=line) as caught:
        load(run.folder, trust_source=True, **options)
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize(
    ("wavs", "lengths", "line"),
    [
        (torch.zeros(16000), None, "shape"),
        (torch.zeros(1, 16000), torch.ones(2), "shape"),
        (torch.zeros(1, 16000), torch.zeros(1), "relative lengths"),
        (torch.zeros(1, 16000), torch.tensor([math.nan]), "relative lengths"),
        (torch.zeros(1, 16000, dtype=torch.int16), None, "torch.int16"),
        (torch.zeros(1, 0), None, "0 samples is too short"),
        (torch.full((1, 16000), math.nan), None, "nan"),
    ],
)
def test_wrong_audio(evaluated, wavs, lengths, line):
    run, _ = evaluated
    found = load(run.folder, "torch", trust_source=True)
    with pytest.raises(ValueError, match=line) as caught:
        found.transcribe_batch(wavs, lengths)
    assert "\n" not in str(caught.value)


def test_commands(evaluated, capsys):
    run, data = evaluated

    def command(*args):
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        return stopped.value.code, *capsys.readouterr()

    row, expected = data.data["0"], run.results["test"].quantized.transcripts
    call = ("transcribe", run.folder, row["wav"], "--backend", "torch")
    assert command(*call)[0] == 1
    call = (*call, "--trust-source")
    code, out, _ = command(*call)
    assert code == 0 and out.split() == expected[0].hypothesis.split()
    code, out, error = command(*call, row["wav"], "--format", "srt")
    assert code == 1 and not out
    assert error.count("no times of words") == 1
    code, out, _ = command(
        *("benchmark", run.folder, "--seconds", "1", "--trust-source")
    )
    assert code == 0 and "torch_int8" in out
    with pytest.raises(CheckpointError, match="no other model can be exported"):
        export_for(run.folder, run.folder / "onnx", "onnxruntime")


def test_what_whisper_would_drop(tmp_path):
    soundfile.write(tmp_path / "long.wav", torch.zeros(31 * 800).numpy(), 800)
    hparams = SimpleNamespace(
        sample_rate=800, pretrainer=SimpleNamespace(live=None)
    )
    whisper = type("WhisperASR", (), {"hparams": hparams})()
    found = ModulesRecognizer(whisper, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"long\.wav: 31\.0 s .* reads 30 s"):
        found.transcribe_file(tmp_path / "long.wav")
