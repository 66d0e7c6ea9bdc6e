"""StableQuant attached to a Brain from Python, evaluation by evaluation."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.decoders import ctc_greedy_decode
from speechbrain.utils.metric_stats import ErrorRateStats
from torch import nn
from torch.utils.data import IterableDataset

from speechbrain_stablequant import StableQuant
from speechbrain_stablequant.brain.checks import RecipeChecks
from speechbrain_stablequant.brain.evaluation import Evaluator
from speechbrain_stablequant.brain.run import Run, comparison

LETTERS = "_AB "
ONE = {"batch_size": 1}


class Tiny(sb.Brain):
    """Two linear layers over windows of the audio, and CTC."""

    def compute_forward(self, batch, stage):
        wavs, lengths = batch.sig
        hidden = self.modules.enc(wavs.unfold(1, 400, 160)).relu()
        return self.modules.lin(hidden).log_softmax(-1), lengths

    def compute_objectives(self, predictions, batch, stage):
        found = ctc_greedy_decode(*predictions, blank_id=0)
        texts = ["".join(LETTERS[i] for i in ids) for ids in found]
        self.wer_metric.append(
            batch.id,
            [text.split() for text in texts],
            [text.split() for text in batch.wrd],
        )
        return torch.zeros((), requires_grad=True)

    def on_stage_start(self, stage, epoch=None):
        self.wer_metric = ErrorRateStats()


@pytest.fixture
def data(tmp_path):
    """Makes a data set of noise with these names."""

    def make(*names: str, text: str = "A B") -> DynamicItemDataset:
        rows = {}
        for number, name in enumerate(names):
            wave = np.random.default_rng(number).normal(0, 0.1, 6000)
            path = tmp_path / f"{name}.wav"
            soundfile.write(path, wave, 16000)
            rows[name] = {"wav": str(path), "wrd": text}
        found = DynamicItemDataset(rows)
        found.add_dynamic_item(read_audio, takes="wav", provides="sig")
        found.set_output_keys(["id", "sig", "wrd"])
        return found

    return make


@pytest.fixture
def attached(tmp_path):
    """Attaches to a new Brain; without ``hparams`` it has no attribute of that
    name."""

    def make(valid_set, hparams=None, **block) -> StableQuant:
        torch.manual_seed(0)
        modules = {"enc": nn.Linear(400, 8), "lin": nn.Linear(8, len(LETTERS))}
        with torch.no_grad():
            modules["lin"].weight.mul_(30)
        options = {"device": "cpu", "noprogressbar": True}
        brain = Tiny(modules, torch.optim.SGD, hparams, options)
        brain.optimizers_dict = {}
        keys = {"target": ["enc", "lin"], "backend": "torch", "method": "max"}
        keys["search"] = {"max_float_wer": 1000.0}
        keys["output_folder"] = str(tmp_path / "out")
        return StableQuant.attach(brain, valid_set, **{**keys, **block})

    return make


def test_a_brain_without_hparams(attached, data):
    quantizer = attached(data("v1", "v2"))
    quantizer.brain.evaluate(data("t1"), test_loader_kwargs=ONE)
    assert list(quantizer.runs[0].results) == ["test"]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(RecipeChecks, "try_out"), (Run, "convert"), (Run, "write_folder")],
)
def test_an_interrupted_evaluation_is_done_again(
    attached, data, monkeypatch, tmp_path, owner, name
):
    """Also by the same Brain, as in a notebook."""

    def interrupt(*_):
        raise KeyboardInterrupt

    quantizer = attached(data("v1", "v2"), weight_bits=2)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantizer.brain.evaluate(data("t1"), test_loader_kwargs=ONE)
    quantizer.brain.evaluate(data("t1"), test_loader_kwargs=ONE)
    (run,) = quantizer.runs
    assert set(run.integers) == {"enc", "lin"}
    text = (tmp_path / "out" / "report.json").read_text("utf-8")
    warnings = json.loads(text)["warnings"]
    assert any(x.startswith("No inference folder") for x in warnings)
    assert len(warnings) == len(set(warnings))


def test_an_interrupted_variant_keeps_the_name_of_its_set(
    attached, data, monkeypatch
):
    variants = [{"name": "a"}, {"name": "b", "weight_bits": 2}]
    quantizer = attached(data("v1", "v2"), variants=variants)
    quantize = Evaluator._quantize

    def interrupt(self, run):
        if run.name == "b":
            raise KeyboardInterrupt
        quantize(self, run)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_quantize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantizer.brain.evaluate(data("t1"), test_loader_kwargs=ONE)
    quantizer.brain.evaluate(data("t1"), test_loader_kwargs=ONE)
    assert [list(run.results) for run in quantizer.runs] == [["test"]] * 2


def test_sets_given_to_attach_are_those_that_decide(attached, data):
    quantizer = attached(data("v1", "v2"), hparams={})
    other = data("o1", "o2", "o3")
    quantizer.brain.fit(range(0), data("t1"), other)
    assert quantizer.runs[0].subsets["calibration"].ids == ["v1", "v2"]
    quantizer = attached(None)
    quantizer.brain.fit(range(0), data("t1"), other)
    assert quantizer.runs[0].subsets["calibration"].ids == ["o1", "o2", "o3"]


class Endless(IterableDataset):
    """A data set without a length."""

    def __iter__(self):
        return iter(())


def test_a_set_without_a_length_is_named(attached, data):
    with pytest.raises(ValueError, match=r"^quantize: Endless is an Iterable"):
        attached(Endless())
    quantizer = attached(data("v1"))
    with pytest.raises(ValueError, match=r"^quantize: Endless is an Iterable"):
        quantizer.brain.evaluate(Endless())


def test_words_of_one_batch_are_not_said_of_the_set(attached, data):
    """What the labels cannot write is counted in the whole set alone."""
    quantizer = attached(data("v1"))
    brain, checks = quantizer.brain, quantizer._evaluator.checks
    brain.tokenizer = CTCTextEncoder()
    brain.tokenizer.update_from_iterable("AB ", sequence_input=False)
    source = SimpleNamespace(keys=("enc", "lin"), blank_index=0)
    loader = brain.make_dataloader(
        data("t1", text="A \u00c4 B"), sb.Stage.TEST, **ONE
    )
    checks._try_decoder(next(iter(loader)), source)
    said = quantizer.runs[0].warnings
    assert not any("cannot be recognized" in text for text in said)
    checks.check_baseline(brain.wer_metric, [], "clean")
    (text,) = (x for x in said if "cannot be recognized" in x)
    assert text.startswith("Of the words of test set 'clean' 1 of 3 cannot")


def test_a_folder_of_the_second_variant_alone():
    """What it holds beside the Brain's modules is its own."""
    own, more = {"enc": nn.Linear(2, 2)}, {"lm": nn.Linear(3, 3)}
    plan = SimpleNamespace(method="max", weight_bits=8, activation_bits=8)
    runs = [
        SimpleNamespace(
            name=name,
            plan=plan,
            effort=None,
            results={},
            stored_modules=modules,
            execution=lambda keys=keys: SimpleNamespace(keys=keys),
        )
        for name, modules, keys in (
            ("one", own, None),
            ("two", {**own, **more}, ("enc", "lm")),
        )
    ]
    assert comparison(runs)["float_mb"] == 4 * (6 + 12) / 1e6
