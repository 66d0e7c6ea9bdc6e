"""Folders of earlier versions load with today's code."""

import shutil
from pathlib import Path

import pytest
import torch
from speechbrain.inference.ASR import EncoderASR

from speechbrain_stablequant import load

#: A random recognizer, written when the modules had other places.
FOLDER = Path(__file__).resolve().parent / "written_earlier"
TEXT = "BGBCBG"


@pytest.fixture
def wave():
    return torch.randn(1, 6000, generator=torch.Generator().manual_seed(92))


def test_from_hparams(wave, tmp_path):
    asr = EncoderASR.from_hparams(
        source=str(FOLDER),
        savedir=str(tmp_path),
        overrides={"backend": "torch"},
    )
    assert asr.transcribe_batch(wave, torch.ones(1))[0] == [TEXT]


def test_load(wave):
    recognizer = load(FOLDER, backend="torch")
    assert recognizer.transcribe_batch(wave, torch.ones(1))[0] == [TEXT]


def test_a_run_s_folder_and_the_model_in_it(wave, tmp_path):
    """Today's layout; its parent may still hold a model of an earlier run."""
    shutil.copytree(FOLDER, tmp_path / "model")
    (tmp_path / "model.safetensors").write_bytes(b"stale")
    for folder in (tmp_path, tmp_path / "model"):
        recognizer = load(folder, backend="torch")
        assert recognizer.transcribe_batch(wave, torch.ones(1))[0] == [TEXT]
