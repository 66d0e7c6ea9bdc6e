"""The parts of a Brain's recognizer, and a folder that executes them."""

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
            backend="openvino",
            output_folder=str(tmp_path / "quantized"),
            **block,
        )
        brain.evaluate(data, test_loader_kwargs={"batch_size": 1})
        (made,) = quantizer.runs
        return made, data, asked

    return run


GRAPH = {"graph": 1.0, "layers": 2.0, "float": 3.0}
FLOAT = {"graph": 3.0, "layers": 2.0, "float": 1.0}


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
    assert "ctc_lin.w" not in run.plan.quants()
    assert any("'ctc_lin' stays float" in text for text in run.warnings)
    assert "another way" not in caplog.text
    saved = QuantizationPlan.load(run.folder / "plan.json")
    assert saved.parts == run.plan.parts
    asr = EncoderASR.from_hparams(source=run.folder)
    heard = [asr.transcribe_file(row["wav"]) for row in data.data.values()]
    transcripts = run.results["test"].quantized.transcripts
    assert heard == [x.hypothesis for x in transcripts]
    # What was decided is not measured again.
    assert evaluated(times)[2] == []
    assert asked != []


@pytest.mark.slow
def test_nothing_that_gains_is_executed_all_the_same(evaluated):
    run, *_ = evaluated({None: FLOAT})
    assert {part.executes for part in run.plan.parts} == {"layers"}
    assert any("Nothing is faster in integers" in x for x in run.warnings)
    assert run.plan.quants()
