"""Folders of recognizers that an inference YAML describes."""

import copy
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import small_recipes
import torch
from speechbrain.inference.ASR import EncoderASR

from speechbrain_stablequant import QuantizeConfig, load
from speechbrain_stablequant.brain.inference_yaml import given_source
from speechbrain_stablequant.brain.rebuilt import check_rebuilt
from speechbrain_stablequant.core.integer_layer import integer_layer
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import LayerPlan, QuantizationPlan
from speechbrain_stablequant.folder import live_modules
from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.folder.stored_floats import rounded_floats
from speechbrain_stablequant.folder.write import write_folder
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes.probe import ProbeError
from speechbrain_stablequant.runtimes.simulated import simulated_forwards
from speechbrain_stablequant.utils.patching import shadowed_forwards


def quantized(brain, config, folder):
    """Writes a Brain's folder; returns what the simulation hears."""
    layers = find_layers(dict(brain.modules.items()), config.target)
    names = [layer.name for layer in layers]
    source, modules = given_source(brain, config, names)
    check_rebuilt(brain, small_recipes.batch(), config, source, modules)
    quant = LayerQuant(8, 8, 4.0)
    rows = [
        LayerPlan(x.name, x.unit, x.kind, quant, 4.0, 100.0, "") for x in layers
    ]
    plan = QuantizationPlan("max", 8, 8, "", {}, {}, [], rows)
    folder.mkdir()
    with rounded_floats(modules, names, "float16"):
        integers = {x.name: integer_layer(x, quant) for x in layers}
        forwards = simulated_forwards(dict(brain.modules.items()), integers)
        with shadowed_forwards(forwards), torch.no_grad():
            *_, ids = brain.compute_forward(small_recipes.batch(), None)
    assert write_folder(folder, modules, plan, integers, "float16", source)
    return [brain.tokenizer.decode_ids(x) for x in ids]


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
    return path / "folder", quantized(brain, config, path / "folder")


def transcripts(asr) -> list[str]:
    """What a recognizer hears in the batch."""
    return asr.transcribe_batch(*small_recipes.batch().sig)[0]


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
