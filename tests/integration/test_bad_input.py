"""What a user gets wrong: one line that names it, before any long work."""

import json
from pathlib import Path

import numpy
import pytest
import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.data_pipeline import provides, takes
from speechbrain.utils.metric_stats import ErrorRateStats, MetricStats
from torch import nn

from speechbrain_stablequant import QuantizationPlan, StableQuant, register
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import LayerPlan
from speechbrain_stablequant.methods.search.score import Score

RATE = 16000
OLD = {
    "plan.json": b"old plan",
    "report.json": b"old report",
    "search.jsonl": json.dumps(
        {"key": "old", "score": Score(1, 2, 3.0).to_dict()}
    ).encode()
    + b"\n",
    "histograms.json": b'{"key": "old"}',
}


class Convolution(nn.Module):
    """Samples to frames.

    Arguments
    ---------
    width : int
        Channels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(1, width, 400, stride=320)

    def forward(self, wavs: torch.Tensor) -> torch.Tensor:
        """``[batch, time]`` to ``[batch, frames, width]``."""
        return self.conv(wavs[:, None]).transpose(1, 2).relu()


class Recognizer(sb.Brain):
    """Counts how often it is asked to recognize."""

    forwards = 0

    def compute_forward(self, batch, stage):
        """Scores of every frame."""
        self.forwards += 1
        wavs, _ = batch.sig
        hidden = self.modules.enc(self.modules.wav2vec2(wavs))
        return self.modules.ctc_lin(hidden)

    def compute_objectives(self, predictions, batch, stage):
        """Each utterance's hypothesis is a word."""
        words = [[f"w{row.sum(0).argmax()}"] for row in predictions]
        self.wer_metric.append(batch.id, words, [w.split() for w in batch.wrd])
        return predictions.square().mean()

    def on_stage_start(self, stage, epoch=None):
        """New statistics."""
        self.wer_metric = ErrorRateStats()


def tiny_modules(width: int = 8) -> dict[str, nn.Module]:
    """Modules with the usual keys."""
    torch.manual_seed(0)
    return {
        "wav2vec2": Convolution(width),
        "enc": nn.Linear(width, width),
        "ctc_lin": nn.Linear(width, 4),
    }


def write_audio(path: Path, samples, rate: int = RATE) -> Path:
    """A WAV file that can hold NaN."""
    data = numpy.asarray(samples, dtype="float32")
    soundfile.write(path, data, rate, subtype="FLOAT")
    return path


def plain(count: int = 8000):
    """Half a second of noise."""
    return 0.1 * numpy.random.RandomState(0).standard_normal(count)


def data_set(paths: dict[str, Path]) -> DynamicItemDataset:
    """A data set as recipes make them."""

    @takes("wav")
    @provides("sig")
    def audio(wav):
        return read_audio(wav)

    rows = {
        name: {"wav": str(path), "wrd": "w1"} for name, path in paths.items()
    }
    return DynamicItemDataset(rows, [audio], ["id", "sig", "wrd"])


@pytest.fixture
def corpus(tmp_path) -> dict[str, Path]:
    """Three good files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    return {
        name: write_audio(folder / f"{name}.wav", plain())
        for name in ("u1", "u2", "u3")
    }


@pytest.fixture
def make_brain(tmp_path):
    """Makes a Brain whose output folder holds an earlier run's files."""
    folder = tmp_path / "out"
    (folder / "quantized").mkdir(parents=True)
    for name, content in OLD.items():
        (folder / "quantized" / name).write_bytes(content)

    def make(modules=None, run_opts=(), hparams=(), **options) -> sb.Brain:
        return Recognizer(
            modules or tiny_modules(),
            hparams={"output_folder": str(folder), **dict(hparams)},
            run_opts={"device": "cpu", "noprogressbar": True, **dict(run_opts)},
            **options,
        )

    yield make
    left = {p.name: p.read_bytes() for p in (folder / "quantized").iterdir()}
    assert left == OLD


def refused(brain, action, *words: str) -> str:
    """Asserts that an action fails with one line and without a forward.

    Arguments
    ---------
    brain : Recognizer
        Must not have been run.
    action : callable
        Of nothing; has to raise.
    *words
        What the message has to name.

    Returns
    -------
    str
        The message.
    """
    with pytest.raises((ValueError, OSError)) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    assert brain is None or brain.forwards == 0
    return text


#: All others are in tests/test_config.py.
BAD_BLOCKS = {
    "unknown key": ({"weight_bitz": 8}, ["weight_bitz", "'weight_bits'"]),
    "unknown nested key": (
        {"search": {"treshold": 1}},
        ["quantize.search.treshold", "'threshold'"],
    ),
    "unknown backend": ({"backend": "tpu"}, ["quantize.backend", "'tpu'"]),
    "one bit": ({"weight_bits": 1}, ["quantize.weight_bits", "2 to 8"]),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_bad_block(name, make_brain):
    block, words = BAD_BLOCKS[name]
    brain = make_brain()
    refused(brain, lambda: register(**block), *words)
    refused(brain, lambda: StableQuant.attach(brain, **block), *words)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_pattern_that_matches_nothing(key, make_brain):
    brain = make_brain()
    block = {key: ["encoder.*"]}
    refused(
        brain,
        lambda: StableQuant.attach(brain, **block),
        f"quantize.{key}",
        "'encoder.*'",
        "wav2vec2.conv",
    )


def test_exclude_leaves_nothing(make_brain):
    brain = make_brain()
    action = lambda: StableQuant.attach(brain, exclude=["*"])  # noqa: E731
    refused(brain, action, "quantize.exclude")


def test_unknown_target(make_brain):
    brain = make_brain()
    refused(
        brain,
        lambda: StableQuant.attach(brain, target=["wav2vec", "enc"]),
        "quantize.target",
        "'wav2vec'",
        "wav2vec2, enc, ctc_lin",
    )


def test_block_in_hparams_is_checked_with_the_brain(make_brain):
    block = register(target=["wav2vec"])
    refused(
        None,
        lambda: make_brain(hparams={"quantize": block}),
        "quantize.target",
    )


def test_empty_calibration_set(make_brain, corpus):
    brain = make_brain()
    nothing = data_set(corpus).filtered_sorted(select_n=0)
    refused(
        brain,
        lambda: StableQuant.attach(brain, nothing),
        "quantize.calibration",
        "empty",
    )


@pytest.mark.parametrize("part", ["calibration", "search"])
def test_set_smaller_than_asked(part, make_brain, corpus):
    brain = make_brain()
    block = {part: {"num_utterances": 4}}
    StableQuant.attach(brain, **block)
    refused(
        brain,
        lambda: brain.fit([], [], data_set(corpus)),
        f"quantize.{part}.num_utterances",
        "4",
        "3",
    )


def bad_audio(kind: str, path: Path) -> None:
    """Writes over a file what cannot be recognized."""
    wave = plain()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        write_audio(path, [])
    elif kind == "no audio":
        path.write_text("nothing to hear", encoding="utf-8")
    elif kind == "8 kHz":
        write_audio(path, wave, 8000)
    elif kind == "stereo":
        write_audio(path, numpy.stack([wave, wave], 1))
    else:
        wave[4000] = {"NaN": numpy.nan, "Inf": numpy.inf}[kind]
        write_audio(path, wave)


BAD_AUDIO = {
    "missing": "not there",
    "empty": "empty",
    "no audio": "cannot be read",
    "8 kHz": "quantize.sample_rate: 8000",
    "stereo": "2 channels",
    "NaN": "NaN",
    "Inf": "Inf",
}


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_bad_audio_in_the_validation_set(kind, make_brain, corpus):
    bad_audio(kind, corpus["u2"])
    brain = make_brain()
    StableQuant.attach(brain)
    words = ("u2", str(corpus["u2"]), BAD_AUDIO[kind])
    refused(brain, lambda: brain.fit([], [], data_set(corpus)), *words)


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_bad_audio_in_the_test_set(kind, make_brain, corpus, tmp_path):
    path = write_audio(tmp_path / "t1.wav", plain())
    bad_audio(kind, path)
    brain = make_brain()
    StableQuant.attach(brain, data_set(corpus))
    test_set = data_set({"t1": path})
    words = ("t1", str(path), BAD_AUDIO[kind])
    refused(brain, lambda: brain.evaluate(test_set), *words)


def test_audio_shorter_than_a_frame(make_brain, make_tiny_modules, corpus):
    write_audio(corpus["u3"], plain(399))
    brain = make_brain(make_tiny_modules("wav2vec2-large"))
    StableQuant.attach(brain)
    fit = lambda: brain.fit([], [], data_set(corpus))  # noqa: E731
    refused(brain, fit, "u3", str(corpus["u3"]), "399 samples", "400")


def test_no_validation_set(make_brain, corpus):
    brain = make_brain()
    StableQuant.attach(brain)
    evaluate = lambda: brain.evaluate(data_set(corpus))  # noqa: E731
    refused(brain, evaluate, "quantize.calibration", "valid_set")


def test_missing_checkpoint(make_brain, corpus, tmp_path):
    modules = tiny_modules()
    checkpointer = Checkpointer(tmp_path / "save", {"enc": modules["enc"]})
    brain = make_brain(modules, checkpointer=checkpointer)
    StableQuant.attach(brain, data_set(corpus))
    refused(
        brain,
        lambda: brain.evaluate(data_set(corpus), min_key="WER"),
        str(tmp_path / "save"),
        "quantize.require_checkpoint",
    )


def test_wrong_metric_attribute(make_brain, corpus):
    brain = make_brain()
    StableQuant.attach(
        brain, data_set(corpus), metric_attribute="word_error_rate"
    )
    refused(
        brain,
        lambda: brain.evaluate(data_set(corpus)),
        "quantize.metric_attribute",
        "'word_error_rate'",
        "wer_metric",
    )


def test_metrics_without_an_error_rate(make_brain, corpus):
    """As in classification: losses and accuracies."""
    brain = make_brain()

    def on_stage_start(stage, epoch=None):
        brain.error_metrics = MetricStats(lambda x: x)

    brain.on_stage_start = on_stage_start
    StableQuant.attach(brain, data_set(corpus))
    refused(
        brain,
        lambda: brain.evaluate(data_set(corpus)),
        "error_metrics (MetricStats)",
    )


def test_output_folder_below_a_file(make_brain, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept", encoding="utf-8")
    brain = make_brain()
    refused(
        brain,
        lambda: StableQuant.attach(brain, output_folder=str(file / "sub")),
        "quantize.output_folder",
        str(file),
    )
    assert file.read_text(encoding="utf-8") == "kept"


def test_no_output_folder():
    brain = Recognizer(
        tiny_modules(), hparams={"x": 1}, run_opts={"device": "cpu"}
    )
    attach = lambda: StableQuant.attach(brain)  # noqa: E731
    refused(brain, attach, "quantize.output_folder")


def plan_for(modules: dict, path: Path) -> dict:
    """Writes a valid plan for modules, and gives it as read."""
    layers = []
    for name, kind in (
        ("wav2vec2.conv", "conv1d"),
        ("enc", "linear"),
        ("ctc_lin", "linear"),
    ):
        if name.partition(".")[0] in modules:
            quant = LayerQuant(8, 8, 1.0)
            layers.append(LayerPlan(name, name, kind, quant, 1.0, 100.0, "x"))
    QuantizationPlan("max", 8, 8, "0", {}, {}, [], layers).save(path)
    return json.loads(path.read_text(encoding="utf-8"))


def test_good_plan_is_taken(make_brain, tmp_path):
    # The counterpart of the tests below: they fail for what they change.
    path = tmp_path / "good.json"
    plan_for(tiny_modules(), path)
    brain = make_brain()
    StableQuant.attach(brain, plan=str(path))
    assert brain.stablequant.config.plan == str(path)


def test_plan_leaves_out_what_its_run_did(make_brain, tmp_path):
    # Such as layers of the training alone, which its block did not name.
    path = tmp_path / "less.json"
    plan = plan_for({"wav2vec2": None, "ctc_lin": None}, path)
    plan["settings"] = {"exclude": ["enc"]}
    path.write_text(json.dumps(plan))
    brain = make_brain()
    StableQuant.attach(brain, plan=str(path))
    (run,) = brain.stablequant.runs
    assert [x.name for x in run.layers] == ["wav2vec2.conv", "ctc_lin"]


def test_plan_of_another_model(make_brain, tmp_path):
    path = tmp_path / "other.json"
    plan_for({"wav2vec2": None, "ctc_lin": None}, path)
    brain = make_brain()
    refused(
        brain,
        lambda: StableQuant.attach(brain, plan=str(path)),
        "quantize.plan",
        str(path),
        "'enc'",
    )


DAMAGED = {
    "half": lambda plan: json.dumps(plan)[: len(json.dumps(plan)) // 2],
    "list": lambda plan: json.dumps([plan]),
    "other format": lambda plan: json.dumps({**plan, "format": 99}),
    "no layers": lambda plan: json.dumps(
        {key: value for key, value in plan.items() if key != "layers"}
    ),
    "number for layers": lambda plan: json.dumps({**plan, "layers": 7}),
    "empty": lambda plan: "",
    "report": lambda plan: json.dumps({"test": {}, "format": 1}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_plan(name, make_brain, tmp_path):
    path = tmp_path / "damaged.json"
    text = DAMAGED[name](plan_for(tiny_modules(), path))
    path.write_text(text, encoding="utf-8")
    brain = make_brain()
    refused(brain, lambda: StableQuant.attach(brain, plan=str(path)), str(path))
    assert path.read_text(encoding="utf-8") == text


BAD_QUANTS = {
    "text": {"activation_amax": "large"},
    "negative": {"activation_amax": -1.0},
    "bits": {"activation_bits": 99},
    "method": {"weight_method": "guess"},
}


@pytest.mark.parametrize("name", BAD_QUANTS)
def test_plan_with_an_impossible_layer(name, make_brain, tmp_path):
    path = tmp_path / "edited.json"
    plan = plan_for(tiny_modules(), path)
    plan["layers"][1]["quant"].update(BAD_QUANTS[name])
    path.write_text(json.dumps(plan), encoding="utf-8")
    brain = make_brain()
    (key,) = BAD_QUANTS[name]
    refused(
        brain,
        lambda: StableQuant.attach(brain, plan=str(path)),
        str(path),
        "plan.layers[1]" if name == "text" else "enc",
        key,
    )


def test_missing_plan(make_brain, tmp_path):
    brain = make_brain()
    path = str(tmp_path / "none.json")
    attach = lambda: StableQuant.attach(brain, plan=path)  # noqa: E731
    refused(brain, attach, path, "no such file")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("jit", True),
        ("compile", True),
        ("data_parallel_backend", True),
    ],
)
def test_options_that_replace_modules(option, value, make_brain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    brain = make_brain(run_opts={option: value})
    refused(brain, lambda: StableQuant.attach(brain), f"--{option}")


def test_keys_without_their_option_replace_nothing(make_brain):
    keys = {"jit_module_keys": ["enc"], "compile_module_keys": ["enc"]}
    StableQuant.attach(make_brain(run_opts=keys))


def test_two_blocks(make_brain):
    blocks = {"quantize": register(), "again": register(weight_bits=6)}
    refused(None, lambda: make_brain(hparams=blocks), "quantize", "two")


def test_variant_with_a_pattern_that_matches_nothing(make_brain):
    brain = make_brain()
    variants = [{"name": "a"}, {"name": "b", "exclude": ["nope*"]}]
    refused(
        brain,
        lambda: StableQuant.attach(brain, variants=variants),
        "exclude",
        "'nope*'",
    )


def test_variant_with_a_missing_plan(make_brain, tmp_path):
    brain = make_brain()
    path = str(tmp_path / "none.json")
    variants = [{"name": "a", "plan": path}]
    refused(brain, lambda: StableQuant.attach(brain, variants=variants), path)


@pytest.mark.parametrize("key", ["signal", "audio", "metric_attribute"])
def test_variant_with_a_key_that_has_no_effect(key):
    variants = [{"name": "a", key: "wave"}]
    refused(None, lambda: register(variants=variants), "variants", key)


def test_truncated_audio(make_brain, corpus, tmp_path):
    path = tmp_path / "u2.flac"
    soundfile.write(path, plain(16000), RATE)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    corpus["u2"] = path
    brain = make_brain()
    StableQuant.attach(brain)

    def action():
        brain.fit([], [], data_set(corpus))
        brain.evaluate(data_set(corpus))

    refused(brain, action, "u2", str(path))


@pytest.mark.parametrize("file", ["histograms.json", "search.jsonl"])
def test_damaged_file_of_an_earlier_run(file, make_brain, corpus, tmp_path):
    path = tmp_path / "out" / "quantized" / file
    path.write_bytes(b"damaged\n")

    def action():
        brain = make_brain()
        StableQuant.attach(brain, data_set(corpus))
        try:
            brain.evaluate(data_set(corpus))
        finally:
            assert brain.forwards == 0

    try:
        refused(None, action, str(path))
        assert path.read_bytes() == b"damaged\n"
    finally:
        # For the fixture, which looks after it.
        path.write_bytes(OLD[file])


def test_wrong_metric_attribute_before_training(make_brain, corpus):
    brain = make_brain(run_opts={"test_only": True})
    StableQuant.attach(brain, metric_attribute="word_error_rate")
    refused(
        brain,
        lambda: brain.fit([], [], data_set(corpus)),
        "quantize.metric_attribute",
    )


def test_empty_test_set(make_brain, corpus):
    brain = make_brain()
    StableQuant.attach(brain, data_set(corpus))
    nothing = data_set(corpus).filtered_sorted(select_n=0)
    refused(brain, lambda: brain.evaluate(nothing), "test set")


def test_attached_twice(make_brain):
    brain = make_brain()
    StableQuant.attach(brain)
    refused(brain, lambda: StableQuant.attach(brain, weight_bits=6), "attach")
