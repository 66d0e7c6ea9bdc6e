"""The demo checkpoint as a folder of the Hub."""

import jiwer
import soundfile
import torch
from speechbrain.inference.ASR import EncoderASR

from speechbrain_stablequant.brain.source import check_source

SPEAKER = "demo/LibriSpeech/test-demo"


def test_folder_recognizes(script, tmp_path):
    made = script("make_hub_folder")
    recipe = made.Path(made.__file__).parent
    made.make_hub_folder(tmp_path, str(recipe / "demo" / "checkpoint"))
    assert check_source(tmp_path, False) == "EncoderASR"
    texts = sorted((recipe / SPEAKER).rglob("*.trans.txt"))[0]
    name, _, text = (
        texts.read_text(encoding="utf-8").split("\n")[0].partition(" ")
    )
    wave, _ = soundfile.read(texts.with_name(f"{name}.flac"), dtype="float32")
    asr = EncoderASR.from_hparams(source=str(tmp_path))
    (found,), _ = asr.transcribe_batch(
        torch.from_numpy(wave)[None], torch.ones(1)
    )
    assert jiwer.cer(text, found) < 0.3, found
