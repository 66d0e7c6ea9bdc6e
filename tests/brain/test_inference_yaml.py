"""Folders of recognizers that an inference YAML describes."""

import copy
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import small_recipes
import torch
from small_recipes import folder_of, transcripts
from speechbrain.inference.ASR import EncoderASR

from speechbrain_stablequant import QuantizeConfig, load
from speechbrain_stablequant.folder import live_modules
from speechbrain_stablequant.folder.errors import CheckpointError, NoFolderError
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
    folder, heard = conformer
    assert transcripts(load(folder, trust_source=True)) == heard
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "hyperparams.yaml"
    text = path.read_text()
    path.write_text(re.sub('checksum: "....', 'checksum: "0000', text))
    for read in (
        EncoderASR.from_hparams,
        partial(load, trust_source=True),
    ):
        with pytest.raises(CheckpointError, match="is not the model that hyp"):
            read(tmp_path / "other")


def test_what_the_recipe_lacks_is_loaded_once(tmp_path):
    text = small_recipes.FEATURES + small_recipes.CONFORMER
    brain = small_recipes.make(
        small_recipes.Conformer, text + small_recipes.CTC_RECIPE, tmp_path
    )
    given = text + small_recipes.CTC_INFERENCE
    given = given.replace(
        "modules:\n",
        "lm_model: !new:torch.nn.Linear\n"
        "    in_features: 3\n    out_features: 2\n"
        "modules:\n    lm: !ref <lm_model>\n",
    )
    given = given.replace(
        "    loadables:\n", "    loadables:\n        lm: !ref <lm_model>\n"
    )
    path = tmp_path / "inference.yaml"
    path.write_text(given)
    block = {
        "inference": str(path),
        "target": ["CNN", "Transformer", "ctc_lin"],
    }
    config = QuantizeConfig.from_dict(block)
    with pytest.raises(NoFolderError, match="'lm_model', and it cannot be lo"):
        folder_of(brain, config, tmp_path / "none")
    model = torch.nn.Linear(3, 2)
    torch.save(model.state_dict(), tmp_path / "lm.ckpt")
    folder_of(brain, config, tmp_path / "folder")
    (tmp_path / "lm.ckpt").unlink()
    asr = EncoderASR.from_hparams(source=tmp_path / "folder")
    torch.testing.assert_close(
        asr.mods.lm.weight, model.weight, atol=1e-3, rtol=0
    )
    assert "lm.ckpt" not in (tmp_path / "folder/hyperparams.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("modules:\n    encoder", "models:\n    encoder"), "no key `modules`"),
        (("cnn: !ref <CNN>", "cnn: !apply:torch.nn.Identity []"), "calls some"),
        (("decoding_function:", "decoding:"), "is none of EncoderASR's"),
        (("ctc_lin: !new", "head: !new"), "no module of it has the tensors"),
    ],
)
def test_what_no_folder_can_be_is_one_line(change, reason, tmp_path):
    text = small_recipes.FEATURES + small_recipes.CONFORMER
    brain = small_recipes.make(
        small_recipes.Conformer, text + small_recipes.CTC_RECIPE, tmp_path
    )
    path = tmp_path / "inference.yaml"
    given = text + small_recipes.CTC_INFERENCE
    if "head" in change[1]:
        given = given.replace(
            "n_neurons: !ref <output_neurons>", "n_neurons: 25"
        )
        given = given.replace("<ctc_lin>", "<head>")
    path.write_text(given.replace(*change))
    config = QuantizeConfig.from_dict(
        {"inference": str(path), "target": ["CNN", "Transformer", "ctc_lin"]}
    )
    with pytest.raises(NoFolderError, match=reason) as caught:
        folder_of(brain, config, tmp_path / "folder")
    assert "\n" not in str(caught.value)
