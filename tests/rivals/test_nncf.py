"""Tests of speechbrain_stablequant.rivals, on small models."""

import importlib.util
import json
from contextlib import suppress

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as ops
from torch import nn

from speechbrain_stablequant.config import ConfigError, QuantizeConfig
from speechbrain_stablequant.methods.search import Score
from speechbrain_stablequant.methods.session import fingerprint_modules
from speechbrain_stablequant.rivals import nncf_
from speechbrain_stablequant.rivals.chain_graph import Chain, products
from speechbrain_stablequant.rivals.nncf_ import (
    Rival,
    make_rival,
    require_nncf,
)
from speechbrain_stablequant.runtimes.base import shadowed_forwards
from speechbrain_stablequant.simulation.prefix_cache import StopForward
from speechbrain_stablequant.utils.store import Store


class Front(nn.Module):
    """Frames of a waveform."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 16, 10, 5)

    def forward(self, wave, lengths=None):
        return torch.tanh(self.conv(wave[:, None])).transpose(1, 2)


class Recognizer:
    """A model whose words are its frames, right where the float model says
    the same.

    Each waveform has a click, for which the range of 8 bits is too wide.
    """

    def __init__(self, modules):
        self.modules = dict(modules.items())
        torch.manual_seed(5)
        self.waves = [torch.randn(1, 900 + 100 * i) for i in range(4)]
        for wave in self.waves:
            wave[0, 500] = 200
        self.truth = [self.output(wave) for wave in self.waves]
        self.scores = []
        self.dies_after = None

    def ids(self, subset):
        return ["a", "b", "c", "d"]

    def key(self, subset, kind):
        return f"{kind} of {subset}"

    @torch.no_grad()
    def output(self, wave):
        for module in self.modules.values():
            wave = module(wave)
        return wave

    def forward(self, subset, before_batch):
        for index, wave in enumerate(self.waves):
            before_batch(index)
            with suppress(StopForward):
                self.output(wave)

    def score(self, before_batch, give_up_above, only=None):
        if len(self.scores) == self.dies_after:
            raise KeyboardInterrupt
        errors, words = [], []
        for index in range(4) if only is None else only:
            out, truth = self.output(self.waves[index]), self.truth[index]
            errors.append(int((out.argmax(-1) != truth.argmax(-1)).sum()))
            words.append(truth[..., 0].numel())
        total = sum(errors), sum(words)
        self.scores.append(tuple(errors))
        return Score(*total, 1.0, True, tuple(errors), tuple(words))


@pytest.fixture(scope="module")
def recognizer():
    torch.manual_seed(1)
    modules = {
        "wav2vec2": Front(),
        "enc": nn.Sequential(nn.Linear(16, 24), nn.ReLU()),
        "ctc_lin": nn.Linear(24, 12),
    }
    return Recognizer(nn.ModuleDict(modules).eval())


def rival_of(recognizer, folder, **block):
    config = QuantizeConfig.from_dict({"method": "nncf", **block})
    folder.mkdir(exist_ok=True)
    return make_rival(
        recognizer,
        recognizer.modules,
        recognizer.waves[0],
        recognizer.truth[0],
        fingerprint_modules(recognizer.modules),
        config,
        Store(folder),
    )


@pytest.fixture
def no_nncf(monkeypatch):
    """Nothing may be quantized any more."""

    def refuse(*args, **kwargs):
        pytest.fail("was quantized again")

    monkeypatch.setattr(nncf_, "_quantize", refuse)
    monkeypatch.setattr(nncf_, "_control", refuse)


@pytest.fixture(scope="module")
def folder(recognizer, tmp_path_factory):
    """Of a finished rival, and the weights before it."""
    folder = tmp_path_factory.mktemp("nncf")
    before = fingerprint_modules(recognizer.modules)
    rival_of(recognizer, folder)
    assert fingerprint_modules(recognizer.modules) == before
    return folder


def test_executes_in_the_place_of_the_modules(recognizer, folder, no_nncf):
    rival = rival_of(recognizer, folder, backend_options={"precision": "f32"})
    files = (folder / "model.xml", folder / "model.bin")
    assert rival.size == sum(len(path.read_bytes()) for path in files)
    assert list(rival.chain) == ["wav2vec2", "enc", "ctc_lin"]
    with shadowed_forwards(rival.forwards()):
        found = [recognizer.output(wave) for wave in recognizer.waves]
    for out, truth in zip(found, recognizer.truth, strict=True):
        assert out.shape == truth.shape
        error = (out - truth).norm() / truth.norm()
        assert 1e-3 < error < 0.5
    batch = torch.zeros(2, 1000)
    with (
        shadowed_forwards(rival.forwards()),
        pytest.raises(ValueError, match="one utterance at a time"),
    ):
        recognizer.output(batch)


def test_every_layer_of_an_encoder_is_counted(make_tiny_modules, tmp_path):
    modules = make_tiny_modules("wav2vec2-large")
    rival = rival_of(Recognizer(modules), tmp_path)
    layers = {
        name
        for key, module in modules.items()
        for name, child in module.named_modules(prefix=key)
        if isinstance(child, nn.Linear | nn.Conv1d)
    }
    # Behind a product of query, key and value there are no weights.
    attention = {
        f"wav2vec2.model.encoder.layers.{i}.attention" for i in range(2)
    }
    assert {*rival.integer, *rival.floating} == layers | attention
    assert attention <= set(rival.floating)
    (first, *_) = rival.notes()
    assert first.startswith(
        f"NNCF quantized {len(rival.integer)} of {len(layers) + 2} products"
    )


def test_another_question_is_answered_anew(recognizer, folder, tmp_path):
    """A finished model is used for what it was made from only."""
    record = (folder / "nncf.json").read_text("utf-8")
    key = rival_of(recognizer, folder).key
    weight = next(recognizer.modules["ctc_lin"].parameters())
    changed = {
        "preset": {"nncf": {"preset": "performance"}},
        "dtype": {"float_dtype": "float32"},
        "method": {"method": "nncf_accuracy_control"},
    }
    keys = {
        name: nncf_._key(
            recognizer,
            "w",
            QuantizeConfig.from_dict({"method": "nncf", **block}),
        )
        for name, block in changed.items()
    }
    config = QuantizeConfig.from_dict({"method": "nncf"})
    keys["same"] = nncf_._key(recognizer, "w", config)
    keys["weights"] = nncf_._key(recognizer, "v", config)
    assert len(set(keys.values())) == len(keys)
    assert key not in keys.values()
    assert weight.requires_grad  # the float model is as it was
    assert (folder / "nncf.json").read_text("utf-8") == record


def test_a_damaged_model_is_made_again(recognizer, folder, tmp_path, no_nncf):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    rival_of(recognizer, copy)
    content = bytearray((copy / "model.bin").read_bytes())
    content[-1] ^= 1
    (copy / "model.bin").write_bytes(content)
    with pytest.raises(pytest.fail.Exception, match="quantized again"):
        rival_of(recognizer, copy)


def test_accuracy_control_makes_operations_float(recognizer, tmp_path):
    """Also when it was killed on its way."""
    recognizer.scores.clear()
    block = {
        "method": "nncf_accuracy_control",
        "nncf": {"max_drop": 0.0, "ranking_utterances": 2},
        "backend_options": {"precision": "f32"},
    }
    recognizer.dies_after = 4
    with pytest.raises(KeyboardInterrupt):
        rival_of(recognizer, tmp_path, **block)
    assert len(recognizer.scores) == 4
    recognizer.dies_after = None
    rival = rival_of(recognizer, tmp_path, **block)
    measured = list(recognizer.scores)
    answers = json.loads((tmp_path / "nncf_answers.json").read_text("utf-8"))
    found = [row["score"]["utterance_errors"] for row in answers["content"]]
    assert [list(errors) for errors in measured] == found
    assert measured[1] == (0, 0, 0, 0)  # the float model, after a first try
    assert sum(measured[2]) > 0  # all quantized
    assert any(len(errors) == 2 for errors in measured)  # ranking
    search = rival.search
    assert search["baseline_wer"] == 0
    whole = [errors for errors in measured if len(errors) == 4]
    assert search["evaluations"] == len(whole)
    with shadowed_forwards(rival.forwards()):
        score = recognizer.score(lambda _: None, None)
    # Stored in half precision since it was measured.
    assert score.wer == pytest.approx(search["final_wer"], abs=2)
    assert search["reached"] == (search["final_wer"] == 0)
    assert "wav2vec2.conv" in rival.floating
    assert rival.operations == {
        "integer": len(rival.integer),
        "float": 3 - len(rival.integer),
    }
    assert len(rival.notes()) == 3 - search["reached"]


def test_a_report_names_some_operations_only(tmp_path):
    names = tuple(f"layer.{i}" for i in range(20))
    rival = Rival("key", tmp_path, (), names, {}, {}, {})
    (first, _) = rival.notes()
    assert "layer.7 and 12 more, see nncf.json" in first
    rival = Rival("key", tmp_path, names, (), {}, {}, {})
    assert rival.notes()[0] == "NNCF quantized 20 of 20 products."


# -- graphs, by hand -----------------------------------------------------------


def product(left, right):
    x = ops.parameter([2, 4], np.float32, name="x")
    node = ops.matmul(left(x), right(), False, True)
    node.set_friendly_name("__module.enc.layer/aten::linear/MatMul")
    return ov.Model([node], [x])


def quantized(x):
    ends = [ops.constant(np.float32(v)) for v in (-1, 1, -1, 1)]
    return ops.fake_quantize(x, *ends, 256)


def int8():
    weight = ops.constant(np.ones((3, 4), np.int8))
    scale = ops.constant(np.full((3, 1), 0.1, np.float32))
    return ops.multiply(ops.convert(weight, np.float32), scale)


def half():
    weight = ops.constant(np.ones((3, 4), np.float16))
    return ops.convert(weight, np.float32)


@pytest.mark.parametrize(
    "left, right, integer",
    [
        (quantized, int8, True),
        (lambda x: ops.transpose(quantized(x), [0, 1]), int8, True),
        (lambda x: x, int8, False),
        (quantized, half, False),
        # A scale of a float activation makes no integers of it.
        (lambda x: ops.multiply(x, np.float32(2)), int8, False),
        (lambda x: ops.relu(quantized(x)), int8, False),
    ],
)
def test_products(left, right, integer):
    found = products(product(left, right))
    assert found == ((["enc.layer"], []) if integer else ([], ["enc.layer"]))


# -- errors before any work ----------------------------------------------------


@pytest.mark.parametrize(
    "block, where",
    [
        ({"weight_bits": 6}, "weight_bits: NNCF quantizes to 8 bits, not to 6"),
        ({"activation_bits": 4}, "activation_bits: "),
        ({"exclude": ["*.0"]}, "exclude: "),
        ({"include": ["enc*"]}, "include: "),
        ({"search": {"batch_size": 2}}, "search.batch_size: "),
        ({"nncf": {"max_drop": -1}}, "nncf.max_drop: "),
        ({"nncf": {"preset": "fast"}}, "nncf.preset: 'fast' is not one of"),
        ({"nncf": {"ranking_utterances": 0}}, "nncf.ranking_utterances: "),
        ({"nncf": {"max_dorp": 1}}, "nncf.max_dorp: unknown key; did you"),
    ],
)
def test_blocks_that_are_refused(block, where):
    with pytest.raises(ConfigError) as error:
        QuantizeConfig.from_dict({"method": "nncf_accuracy_control", **block})
    text = str(error.value)
    assert text.startswith(f"quantize.{where}")
    assert "\n" not in text


def test_a_plan_is_no_rival():
    config = QuantizeConfig.from_dict({"method": "nncf", "plan": "plan.json"})
    assert not config.is_rival


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_missing_package(package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == package else found(name),
    )
    with pytest.raises(ValueError) as error:
        require_nncf("nncf")
    assert f"'{package}'" in str(error.value)
    assert "speechbrain_stablequant[nncf]" in str(error.value)


def test_a_model_that_changes_is_refused(recognizer, tmp_path):
    """What the graph gives is compared with what the recipe gave."""
    config = QuantizeConfig.from_dict({"method": "nncf"})
    with pytest.raises(ValueError, match=r"conversion of .* changes the out"):
        make_rival(
            recognizer,
            recognizer.modules,
            recognizer.waves[0],
            recognizer.truth[0] + 1,
            "w",
            config,
            Store(tmp_path),
        )


def test_chain_is_the_modules_in_order():
    double, shift = nn.Linear(1, 1), nn.ReLU()
    x = torch.tensor([[2.0]])
    assert torch.equal(Chain({"a": double, "b": shift})(x), shift(double(x)))
