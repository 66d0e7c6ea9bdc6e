"""Folders of recognizers that an inference YAML describes."""

import copy
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import small_recipes
from small_recipes import folder_of, transcripts
from speechbrain.inference.ASR import EncoderASR

from speechbrain_stablequant import QuantizeConfig, load
from speechbrain_stablequant.folder import live_modules
from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.runtimes.probe import ProbeError


@pytest.fixture(scope="module")
def conformer(tmp_path_factory):
    """A Conformer's folder, and what its simulation hears."""
    path = tmp_path_factory.mktemp("conformer")
    text = small_recipes.FEATURES + small_recipes.CONFORMER
    brain = small_recipes.make(
        small_recipes.Conformer, text + small_recipes.CTC_RECIPE, path
    )
    (path / "inference.yaml").write_text(text + small_recipes.CTC_INFERENCE)
    config = QuantizeConfig.from_dict(
        {
            "inference": str(path / "inference.yaml"),
            "target": ["CNN", "Transformer", "ctc_lin"],
        }
    )
    return path / "folder", folder_of(brain, config, path / "folder")


def runtime(asr) -> str | None:
    """The runtime that computes."""
    return asr.hparams.pretrainer.live.runtime


def test_the_folder_transcribes_as_the_simulation_does(conformer):
    folder, heard = conformer
    asr = EncoderASR.from_hparams(source=folder, overrides={"backend": "torch"})
    assert len("".join(heard)) > 8
    assert transcripts(asr) == heard
    assert asr.mods.encoder["ctc_lin"].w.weight is None
    assert runtime(asr) == "torch"
    text = (folder / "hyperparams.yaml").read_text()
    assert "somewhere" not in text and "asr_model" not in text


def test_integers_compute_it(conformer):
    folder, _ = conformer
    asr = EncoderASR.from_hparams(
        source=folder, overrides={"backend": "torch_int8"}
    )
    before = transcripts(asr)
    assert runtime(asr) == "torch_int8"
    twin = copy.deepcopy(asr)
    assert runtime(twin) is None
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(transcripts, x) for x in [asr, twin] * 3]
    assert [x.result() for x in answers] == [before] * 6
    assert runtime(twin) == "torch_int8"
    assert twin.mods.encoder is not asr.mods.encoder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_computes_the_same(conformer):
    folder, _ = conformer
    asr = EncoderASR.from_hparams(
        source=folder, overrides={"backend": "torch_int8"}
    )
    before = transcripts(asr)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(transcripts(asr)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert json.loads(pipe.read()) == before
    os.waitpid(pid, 0)


def test_a_wrong_runtime_is_not_used(conformer, monkeypatch):
    folder, heard = conformer
    original = live_modules.build_forwards

    def build(name, *args, **options):
        forwards = original(name, *args, **options)
        if name == "torch":
            return forwards
        return {m: lambda x, f=f: -f(x) for m, f in forwards.items()}

    monkeypatch.setattr(live_modules, "build_forwards", build)
    asr = EncoderASR.from_hparams(source=folder)
    assert transcripts(asr) == heard
    assert runtime(asr) == "torch"
    asr = EncoderASR.from_hparams(
        source=folder, overrides={"backend": "torch_int8"}
    )
    with pytest.raises(ProbeError, match="backend: torch_int8 computes some"):
        transcripts(asr)


def test_a_folder_of_two_models_is_refused(conformer, tmp_path):
    folder, _ = conformer
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "hyperparams.yaml"
    text = path.read_text()
    path.write_text(re.sub('checksum: "....', 'checksum: "0000', text))
    with pytest.raises(CheckpointError, match="is not the model that hyperp"):
        EncoderASR.from_hparams(source=tmp_path / "other")
    with pytest.raises(CheckpointError, match="load it with the class of Spe"):
        load(folder)
