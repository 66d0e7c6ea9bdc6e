"""A Brain's own evaluation writes a folder that SpeechBrain's class loads."""

import json

import small_recipes as recipes
import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.inference.ASR import EncoderDecoderASR

from speechbrain_stablequant import StableQuant


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


def test_the_folder_transcribes_as_the_evaluation_did(tmp_path):
    text = recipes.FEATURES + recipes.SEQ2SEQ_RECIPE
    brain = recipes.make(Seq2Seq, text, tmp_path)
    data = utterances(tmp_path)
    quantizer = StableQuant.attach(
        brain,
        valid_set=data,
        target=["CNN", "Transformer", "seq_lin", "ctc_lin"],
        method="max",
        calibration={"num_utterances": 2},
        search={"max_float_wer": 1000},
        backend="torch",
        output_folder=str(tmp_path / "quantized"),
    )
    brain.evaluate(data, test_loader_kwargs={"batch_size": 1})
    (run,) = quantizer.runs
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
