"""What was measured is believed as long as what it depends on is the same.

A small recipe is quantized, something is changed, and it is quantized again in
the same folder: what depends on the change is measured again, and nothing
else.
"""

import errno
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.data_pipeline import provides, takes
from speechbrain.utils.metric_stats import ErrorRateStats
from torch import nn

from speechbrain_stablequant import StableQuant
from speechbrain_stablequant.brain.dependencies import (
    Dependencies,
    dataset_digest,
    hparams_of,
    trace,
)
from speechbrain_stablequant.brain.run import Run
from speechbrain_stablequant.utils.lock import FolderInUse, FolderLock
from speechbrain_stablequant.utils.store import Store

WRITE_REPORT = Run.write_report
WORDS = [f"w{i}" for i in range(4)]


class Encoder(nn.Module):
    """Samples to frames."""

    def __init__(self, output_norm=False, activation=nn.GELU):
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 400, stride=320)
        self.act = activation()
        self.output_norm = output_norm

    def forward(self, wavs):
        x = self.act(self.conv(wavs[:, None])).transpose(1, 2)
        return x / x.std() if self.output_norm else x


@dataclass
class Decoder:
    """The best word of each group of frames."""

    frames: int

    def __call__(self, scores):
        groups = scores.unfold(1, self.frames, self.frames).sum(-1)
        return [[WORDS[i] for i in row.argmax(-1)] for row in groups]


class Recognizer(sb.Brain):
    """Reads its hparams and batches as recipes do."""

    def compute_forward(self, batch, stage):
        batch = batch.to(self.device)
        wavs, _ = batch.sig
        wavs = wavs * self.hparams.gain
        hidden = self.modules.enc(self.modules.wav2vec2(wavs))
        scores = self.modules.ctc_lin(hidden).log_softmax(-1)
        if stage == sb.Stage.TEST:
            return scores, self.hparams.test_search(scores)
        return scores, self.hparams.valid_search(scores)

    def compute_objectives(self, predictions, batch, stage):
        scores, words = predictions
        targets = [text.split() for text in batch.wrd]
        self.wer_metric.append(batch.id, words, targets)
        return self.loss(scores)

    def loss(self, scores):
        return scores.square().mean()

    def on_stage_start(self, stage, epoch=None):
        self.wer_metric = self.hparams.error_rate_computer()


class OtherLoss(Recognizer):
    """Its compute_objectives is the same."""

    def loss(self, scores):
        return scores.abs().mean()


class Louder(Recognizer):
    """Another compute_forward."""

    def compute_forward(self, batch, stage):
        batch.sig.data.mul_(1.5)
        return super().compute_forward(batch, stage)


@dataclass(frozen=True)
class Recipe:
    """All that a test may change."""

    valid_gain: float = 1.0
    test_gain: float = 1.0
    valid_text: str = "w1 w2"
    test_text: str = "w1 w2"
    pipeline_gain: float = 1.0
    module_changes: tuple = ()
    output_norm: bool = False
    activation: type = nn.GELU
    kind: type = Recognizer
    hparams: tuple = ()
    block: tuple = ()
    test_batch: int = 1
    eval_precision: str = "fp32"
    seed: int = 0


def make_set(folder, name, text, gain, pipeline_gain, seed):
    @takes("wav")
    @provides("sig")
    def audio(wav):
        return read_audio(wav) * pipeline_gain

    rows = {}
    for number in range(4):
        path = folder / f"{name}{number}.wav"
        generator = torch.Generator().manual_seed(10 * number + seed)
        count = 8000 + 1000 * number
        wave = gain * 0.1 * torch.randn(count, generator=generator)
        soundfile.write(path, wave.numpy(), 16000, subtype="PCM_16")
        rows[f"{name}{number}"] = {"wav": str(path), "wrd": text}
    return DynamicItemDataset(rows, [audio], ["id", "sig", "wrd"])


def run(folder: Path, recipe: Recipe) -> dict:
    """Quantizes; gives what identifies all that is remembered."""
    torch.manual_seed(0)
    modules = {
        "wav2vec2": Encoder(recipe.output_norm, recipe.activation),
        "enc": nn.Linear(8, 8),
        "ctc_lin": nn.Linear(8, 4),
    }
    for change in recipe.module_changes:
        change(modules)
    hparams = {
        "output_folder": str(folder),
        "gain": 1.0,
        "valid_search": Decoder(5),
        "test_search": Decoder(5),
        "error_rate_computer": partial(ErrorRateStats),
        "lr": 0.1,
        "train_logger": object(),
        **dict(recipe.hparams),
    }
    opts = {
        "device": "cpu",
        "noprogressbar": True,
        "eval_precision": recipe.eval_precision,
    }
    brain = recipe.kind(modules, hparams=hparams, run_opts=opts)
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    make = partial(
        make_set, corpus, pipeline_gain=recipe.pipeline_gain, seed=recipe.seed
    )
    valid = make("dev", recipe.valid_text, recipe.valid_gain)
    test = make("test", recipe.test_text, recipe.test_gain)
    block = {
        "weight_bits": 4,
        "activation_bits": 4,
        "backend": "torch",
        "search": {
            "cutoffs": [100, 99],
            "threshold": 0.0,
            "max_float_wer": 1e4,
        },
        **dict(recipe.block),
    }
    attached = StableQuant.attach(brain, valid, **block)
    options = {"batch_size": recipe.test_batch}
    brain.evaluate(test, test_loader_kwargs=options)
    quantized = folder / "quantized"
    labels = [row["label"] for row in Store(quantized).rows("search.jsonl")]
    names = ("histograms.json", "transcripts_test.json")
    found = {
        name: json.loads((quantized / name).read_text())["key"]
        for name in names
    }
    found["searches"] = labels.count("float")
    found["evaluations"] = len(labels)
    found["result"] = attached.runs[0].results["test"].to_dict()
    return found


@pytest.fixture(autouse=True, scope="module")
def no_reports():
    """Their figures take longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "write_report", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder of a finished run, and what it holds."""
    folder = tmp_path_factory.mktemp("start")
    return folder, run(folder, Recipe(block=SEARCH))


def again(folder: Path, change: dict, start: tuple) -> set[str]:
    """What a run measures again after a change."""
    finished, before = start
    shutil.copytree(finished / "quantized", folder / "quantized")
    after = run(folder, replace(Recipe(block=SEARCH), **change))
    measured = set()
    if after["histograms.json"] != before["histograms.json"]:
        measured.add("histograms")
    if after["searches"] != before["searches"]:
        measured.add("scores")
    if after["transcripts_test.json"] != before["transcripts_test.json"]:
        measured.add("transcripts")
    if not measured:
        assert after["evaluations"] == before["evaluations"]
        assert after["result"] == before["result"]
    return measured


ALL = {"histograms", "scores", "transcripts"}
SEARCH = (
    ("search", {"cutoffs": [100, 99], "threshold": 0.0, "max_float_wer": 1e4}),
)
CHANGES = {
    "nothing": ({}, set()),
    "all audio is another": ({"seed": 1}, ALL),
    "audio of the validation set": (
        {"valid_gain": 0.5},
        {"histograms", "scores"},
    ),
    "audio of the test set": ({"test_gain": 0.5}, {"transcripts"}),
    "transcripts of the validation set": (
        {"valid_text": "w1 w3"},
        {"scores"},
    ),
    "transcripts of the test set": ({"test_text": "w1 w3"}, {"transcripts"}),
    "what the pipeline does": ({"pipeline_gain": 0.5}, ALL),
    "a weight": (
        {"module_changes": (lambda m: m["enc"].weight.data.mul_(2),)},
        ALL,
    ),
    "output_norm": ({"output_norm": True}, ALL),
    "an activation": ({"activation": nn.ReLU}, ALL),
    "a value that is read before the layers": (
        {"hparams": (("gain", 2.0),)},
        ALL,
    ),
    "decoding of the validation set": (
        {"hparams": (("valid_search", Decoder(6)),)},
        {"scores"},
    ),
    "decoding of the test set": (
        {"hparams": (("test_search", Decoder(6)),)},
        {"transcripts"},
    ),
    "code of compute_forward": ({"kind": Louder}, ALL),
    "code that compute_objectives calls": (
        {"kind": OtherLoss},
        {"scores", "transcripts"},
    ),
    "how errors are counted": (
        {
            "hparams": (
                ("error_rate_computer", partial(ErrorRateStats, keep_values=0)),
            )
        },
        {"scores", "transcripts"},
    ),
    "batches of the search": (
        {"block": (("search", {**dict(SEARCH)["search"], "batch_size": 2}),)},
        {"scores"},
    ),
    "batches of the test": ({"test_batch": 2}, {"transcripts"}),
    "precision": ({"eval_precision": "bf16"}, ALL),
    "what only a training reads": ({"hparams": (("lr", 0.2),)}, set()),
    "a logger": ({"hparams": (("train_logger", ErrorRateStats()),)}, set()),
    "bins of histograms": (
        {"block": (("calibration", {"num_bins": 1024}),)},
        {"histograms"},
    ),
    "memory for replays": (
        {"block": (("search", {**dict(SEARCH)["search"], "cache_gb": 0.0}),)},
        set(),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_measured_again(name, start, tmp_path):
    change, expected = CHANGES[name]
    found = again(tmp_path, change, start)
    # A plan from other histograms or scores is another one, mostly.
    if {"histograms", "scores"} & expected:
        found.discard("transcripts")
        expected = expected - {"transcripts"}
    if name == "bins of histograms":
        found.discard("scores")
    assert found == expected


def test_noise_does_not_have_the_old_result(tmp_path):
    """The folder of one corpus, the audio of another with the same IDs."""
    before = run(tmp_path, Recipe())["result"]
    after = run(tmp_path, Recipe(seed=1, valid_gain=9.0, test_gain=9.0))
    fresh = run(
        tmp_path / "fresh", Recipe(seed=1, valid_gain=9.0, test_gain=9.0)
    )
    assert after["result"] == fresh["result"] != before


# -- what is read --------------------------------------------------------------


def traced(kind=Recognizer, **hparams):
    values = {
        "gain": 1.0,
        "valid_search": Decoder(5),
        "test_search": Decoder(5),
        "error_rate_computer": ErrorRateStats,
        **hparams,
    }
    modules = {
        "wav2vec2": Encoder(),
        "enc": nn.Linear(8, 8),
        "ctc_lin": nn.Linear(8, 4),
    }
    return kind(modules, hparams=values, run_opts={"device": "cpu"})


def batch_of(folder):
    data = make_set(folder, "dev", "w1", 1.0, 1.0, 0)
    return next(iter(sb.dataio.dataloader.make_dataloader(data, batch_size=2)))


def test_trace(tmp_path):
    brain, batch = traced(), batch_of(tmp_path)
    hparams, attributes = brain.hparams, dict(vars(brain))
    found = trace(
        brain, batch, sb.Stage.VALID, list(brain.modules["ctc_lin"].modules())
    )
    assert found["inputs"].hparams == {"gain"}
    assert found["outputs"].hparams == {"gain", "valid_search"}
    assert found["scores"].hparams == {
        "gain",
        "valid_search",
        "error_rate_computer",
    }
    assert found["inputs"].batch & {"sig", "wrd", "id"} == {"sig"}
    assert found["scores"].batch >= {"sig", "wrd", "id"}
    assert found["scores"].brain == set()
    # Nothing is left of it but the new metric.
    assert type(brain) is Recognizer
    assert type(batch) is sb.dataio.batch.PaddedBatch
    assert brain.hparams is hparams
    metric = vars(brain).pop("wer_metric")
    assert isinstance(metric, ErrorRateStats)
    assert vars(brain) == attributes


def test_attributes_of_the_brain_and_what_it_sets(tmp_path):
    class WithTokenizer(Recognizer):
        def compute_objectives(self, predictions, batch, stage):
            self.hparams.seen = self.tokenizer["a"]
            self.count = self.count + 1
            return super().compute_objectives(predictions, batch, stage)

    brain = traced(WithTokenizer)
    brain.tokenizer, brain.count = {"a": 1}, 0
    found = trace(brain, batch_of(tmp_path), sb.Stage.VALID, ())
    assert found["scores"].brain == {"tokenizer"}
    assert found["inputs"] == found["outputs"]
    assert brain.hparams.seen == 1
    assert brain.count == 1


def test_a_failing_recipe_is_put_back(tmp_path):
    brain = traced(valid_search=None)
    hparams = brain.hparams
    with pytest.raises(TypeError):
        trace(brain, batch_of(tmp_path), sb.Stage.VALID, ())
    assert type(brain) is Recognizer and brain.hparams is hparams
    assert "compute_forward" not in vars(brain)


def test_a_batch_that_cannot_be_watched_counts_as_a_whole():
    class Plain(Recognizer):
        def compute_forward(self, batch, stage):
            return self.modules.enc(batch["x"])

        def compute_objectives(self, predictions, batch, stage):
            return predictions.mean()

    batch = {"x": torch.zeros(1, 8)}
    found = trace(traced(Plain), batch, sb.Stage.VALID, ())
    assert found["inputs"].batch is None


def test_reading_all_hparams_at_once(tmp_path):
    class Greedy(Recognizer):
        def loss(self, scores):
            return scores.mean() * len(vars(self.hparams))

    found = trace(traced(Greedy), batch_of(tmp_path), sb.Stage.VALID, ())
    assert found["scores"].hparams is None
    assert found["outputs"].hparams is not None


def test_the_quantize_block_is_no_dependency():
    from speechbrain_stablequant import QuantizeConfig

    block = QuantizeConfig.from_dict({})
    brain = sb.Brain(hparams={"lr": 1})
    brain.hparams.quantize = block
    assert hparams_of(brain) == {"lr": 1}
    assert hparams_of(sb.Brain()) == {}


def test_modules_in_hparams_are_not_read_twice(tmp_path):
    """They may be changed while something is measured."""
    brain, batch = traced(), batch_of(tmp_path)
    brain.hparams.gain = brain.modules["ctc_lin"]
    found = Dependencies(brain, ())
    brain.hparams.gain = 1.0
    found.reads(batch, sb.Stage.VALID)
    brain.hparams.gain = brain.modules["ctc_lin"]
    one = found.key(batch, sb.Stage.VALID, "inputs")
    with torch.no_grad():
        brain.modules["ctc_lin"].weight.add_(1)
    assert found.key(batch, sb.Stage.VALID, "inputs") == one
    brain.hparams.gain = nn.Linear(1, 1)
    assert found.key(batch, sb.Stage.VALID, "inputs") != one


# -- training ------------------------------------------------------------------


def test_training_key():
    def key(**changes):
        kind = changes.pop("kind", Recognizer)
        return Dependencies(traced(kind, **changes), ()).training_key()

    same = key()
    assert key() == same
    assert key(unused=5) == same
    others = [key(gain=2.0), key(kind=OtherLoss), key(valid_search=Decoder(7))]
    assert len({same, *others}) == 1 + len(others)


def test_dataset_digest(tmp_path):
    store = Store(tmp_path / "store")

    def found(folder="a", text="w1", gain=1.0, pipeline=1.0):
        (tmp_path / folder).mkdir(exist_ok=True)
        data = make_set(tmp_path / folder, "u", text, gain, pipeline, 0)
        return dataset_digest(data, store)

    same = found()
    assert found() == same
    # Another place, and another time, are no other data.
    assert found("b") == same
    others = [found(text="w2"), found(gain=0.5), found(pipeline=0.5)]
    assert len({same, *others}) == 1 + len(others)


# -- what the search set must be -----------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit", "reason"),
    [
        ("", 1e9, "search set: the transcripts hold no word"),
        ("w1", 100, r"WER on the search set is .* above quantize.search.max_f"),
    ],
)
def test_a_search_set_that_decides_nothing(tmp_path, text, limit, reason):
    search = (("search", {"cutoffs": [100, 99], "max_float_wer": limit}),)
    recipe = Recipe(block=search, valid_text=text, test_text="w1 " * 40)
    with pytest.raises(ValueError, match=reason):
        run(tmp_path, recipe)


# -- a full disk, two runs -----------------------------------------------------


def test_a_full_disk(tmp_path, monkeypatch, caplog, capsys):
    """One line for what is only remembered; what must be written is named at
    the end, after the figures."""
    recipe = Recipe(block=SEARCH)
    expected = run(tmp_path / "roomy", recipe)["result"]
    real, room = os.fsync, [3]

    def fsync(fd):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    caplog.clear()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_report", WRITE_REPORT)
        with pytest.raises(OSError) as caught:
            run(tmp_path / "full", recipe)
    text = str(caught.value)
    assert "\n" not in text and "No space left on device" in text
    for name in ("plan.json", "wer_test.txt", "model/model.safetensors"):
        assert str(tmp_path / "full/quantized" / name) in text
    warned = [
        r.getMessage() for r in caplog.records if r.levelname == "WARNING"
    ]
    assert sum("goes on with what it has in memory" in w for w in warned) == 1
    rate = f"{expected['quantized']['WER']:.2f} % quantized"
    assert rate in capsys.readouterr().out
    assert not list((tmp_path / "full").rglob("*.tmp"))
    # Room again: it goes on from what was kept, to the same end.
    monkeypatch.setattr(os, "fsync", real)
    assert run(tmp_path / "full", recipe)["result"] == expected


def test_two_runs_in_one_folder(tmp_path):
    folder = tmp_path / "quantized"
    folder.mkdir()
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        FolderLock(folder, "").acquire()
        os.write(told, b"1")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(ready, 1)
        with pytest.raises(FolderInUse, match=f"process {pid} on "):
            run(tmp_path, Recipe(block=SEARCH))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert run(tmp_path, Recipe(block=SEARCH))["searches"] == 1
    assert not (folder / ".run.json").exists()
