"""The parts of a Brain's recognizer, and a folder that executes them."""

import json
import logging

import pytest
import small_recipes as recipes
import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.inference.ASR import EncoderASR

from speechbrain_stablequant import StableQuant
from speechbrain_stablequant.core.plan import QuantizationPlan

pytest.importorskip("openvino")

from speechbrain_stablequant.runtimes.captured import select


def utterances(folder, count=3):
    """Noise, each file of another length."""
    rows = {}
    for i in range(count):
        torch.manual_seed(i)
        path = folder / f"{i}.wav"
        wave = 0.1 * torch.randn(9600 + 1600 * i)
        soundfile.write(path, wave.numpy(), 16000)
        rows[str(i)] = {"wav": str(path), "wrd": "A B"}
    data = DynamicItemDataset(rows)
    read = sb.dataio.dataio.read_audio
    data.add_dynamic_item(read, takes="wav", provides="sig")
    data.set_output_keys(["id", "sig", "wrd"])
    return data


class Conformer(recipes.Conformer):
    def on_evaluate_start(self, max_key=None, min_key=None):
        pass


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Evaluates a Conformer whose parts take given times."""

    def run(times, **block):
        asked = []

        def timed(module, calls, ways):
            name = next(
                n for n, m in brain.modules.named_modules() if m is module
            )
            asked.append(name)
            found = times.get(name, times[None])
            return {way: found[way] for way in ways}

        monkeypatch.setattr(select, "timed_ways", timed)
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        folder.mkdir()
        text = recipes.FEATURES + recipes.CONFORMER + recipes.CTC_RECIPE
        brain = recipes.make(Conformer, text, folder)
        data = utterances(tmp_path)
        quantizer = StableQuant.attach(
            brain,
            valid_set=data,
            target=["CNN", "Transformer", "ctc_lin"],
            method="max",
            calibration={"num_utterances": 3},
            search={"max_float_wer": 1000},
            output_folder=str(tmp_path / "quantized"),
            **{"backend": "openvino", **block},
        )
        brain.evaluate(data, test_loader_kwargs={"batch_size": 1})
        (made,) = quantizer.runs
        return made, data, asked

    return run


GRAPH = {"graph": 1.0, "layers": 2.0, "float": 3.0}
FLOAT = {"graph": 3.0, "layers": 2.0, "float": 1.0}


@pytest.mark.slow
def test_parts_are_executed_here_and_from_the_folder(evaluated, caplog):
    times = {None: GRAPH, "ctc_lin": FLOAT}
    with caplog.at_level(logging.WARNING):
        run, data, asked = evaluated(times)
    assert run.backend == "openvino"
    parts = {part.name: part for part in run.plan.parts}
    encoder = parts["Transformer.encoder"]
    assert encoder.executes == "graph", encoder.reason
    assert encoder.way == "trace"
    assert parts["ctc_lin"].executes == "float"
    assert run.plan.quants()["ctc_lin.w"].weight_only
    said = "with weights stored as integers: 'ctc_lin' ("
    assert sum(said in text for text in run.warnings) == 1
    assert "another way" not in caplog.text
    saved = QuantizationPlan.load(run.folder / "plan.json")
    assert saved.parts == run.plan.parts
    asr = EncoderASR.from_hparams(source=run.model_folder)
    heard = [asr.transcribe_file(row["wav"]) for row in data.data.values()]
    transcripts = run.results["test"].quantized.transcripts
    assert heard == [x.hypothesis for x in transcripts]
    # What was decided is not measured again.
    assert evaluated(times)[2] == []
    assert asked != []


@pytest.mark.slow
def test_what_does_not_gain_is_small_and_float(evaluated):
    run, data, _ = evaluated({None: FLOAT}, weight_bits=4)
    assert {part.executes for part in run.plan.parts} == {"float"}
    quants = run.plan.quants()
    assert {layer.name for layer in run.layers} == set(quants)
    assert all(q.weight_only and q.weight_bits == 4 for q in quants.values())
    assert not any("VNNI" in text for text in run.warnings)
    report = json.loads((run.folder / "report.json").read_text())
    shares = report["account"]["parameters"]
    assert shares["quantized"] == 0
    assert shares["weight_only"] == sum(x.numel for x in run.layers)
    asr = EncoderASR.from_hparams(source=run.model_folder)
    heard = [asr.transcribe_file(row["wav"]) for row in data.data.values()]
    transcripts = run.results["test"].quantized.transcripts
    assert heard == [x.hypothesis for x in transcripts]
    # The class computes what the run did, with nothing in the way.
    with run.as_stored():
        kept = {n: x.clone() for n, x in run.brain.modules.named_parameters()}
    linear = asr.mods.encoder.get_submodule("steps.ctc_lin.w")
    assert torch.equal(linear.weight, kept["ctc_lin.w.weight"])
    assert not torch.equal(linear.weight, run.modules["ctc_lin"].w.weight)


@pytest.mark.slow
def test_a_plan_that_was_simulated_is_executed_by_graphs(evaluated, tmp_path):
    times = {None: GRAPH, "ctc_lin": FLOAT}
    run, *_ = evaluated(times, backend="torch")
    assert not run.plan.parts
    run.plan.save(tmp_path / "simulated.json")
    run, data, _ = evaluated(times, plan=str(tmp_path / "simulated.json"))
    parts = {part.name: part.executes for part in run.plan.parts}
    assert parts["Transformer.encoder"] == "graph"
    # It says integers, so they are computed, also where float is as fast.
    assert "ctc_lin" not in parts
    assert not run.plan.quants()["ctc_lin.w"].weight_only
    asr = EncoderASR.from_hparams(source=run.model_folder)
    heard = [asr.transcribe_file(row["wav"]) for row in data.data.values()]
    transcripts = run.results["test"].quantized.transcripts
    assert heard == [x.hypothesis for x in transcripts]
