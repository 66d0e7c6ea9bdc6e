"""The recipe's comparison with the scores of NVIDIA's AutoQuantize."""

import pytest
import torch

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.methods.plus import plan as plus
from speechbrain_stablequant.methods.session import Session
from speechbrain_stablequant.utils.patching import shadowed
from speechbrain_stablequant.utils.store import Store

TARGET = ["wav2vec2", "enc", "ctc_lin"]
BUDGET = {"size": 0.4, "bits": [4, 8, 16]}


@pytest.fixture(scope="module")
def compare(script):
    return script("compare_modelopt")


class Recognizer:
    """A tiny model with two batches."""

    show_progress = False

    def __init__(self, modules):
        self.modules = dict(modules.items())
        self.batches = [torch.randn(2, 1300) for _ in range(2)]
        self.runs = 0

    def key(self, subset, kind):
        return f"{kind} of {subset}"

    @torch.no_grad()
    def forward(self, subset, before_batch, first_only=False):
        outputs = []
        for index, wavs in enumerate(self.batches[: 1 if first_only else 2]):
            before_batch(index)
            self.runs += 1
            x = self.modules["enc"](self.modules["wav2vec2"](wavs))
            outputs.append(self.modules["ctc_lin"](x).log_softmax(-1))
        return outputs[-1]


@pytest.fixture
def session(make_tiny_modules, tmp_path):
    modules = make_tiny_modules("wav2vec2-large", num_hidden_layers=1)
    block = {
        "target": TARGET,
        "method": "stablequant_plus",
        "plus": {"asymmetric": False, "rotate": False, "budget": BUDGET},
    }
    config = QuantizeConfig.from_dict(block)
    return Session(Recognizer(modules), config, Store(tmp_path), ())


def chosen(compare, session):
    """The budget's part of a plan, with modelopt's scores."""
    work = plus.Work(session, "weights", None)
    with shadowed(plus, "choose_unit_bits", compare.choose_bits):
        bits = plus.choose_unit_bits(work, work.original, {})
    (part,) = work.parts
    assert part["scores"] == "modelopt"
    assert bits == {u: row["bits"] for u, row in part["units"].items()}
    return part


def test_scores_decide(compare, session, monkeypatch):
    """Without modelopt: what it would have scored."""
    steep = "block.0"
    scores = {
        x.name: {4: 9.0 if x.unit == steep else 0.1, 8: 0.0}
        for x in session.layers
    }
    monkeypatch.setattr(compare, "modelopt_scores", lambda *_: scores)
    units = chosen(compare, session)["units"]
    assert units[steep]["bits"] > 4
    harm = [option["harm"] for option in units[steep]["options"]]
    assert harm[0] == pytest.approx(9.0 * len(session.units[steep]))
    assert harm[1:] == [0.0, 0.0]


def test_inputs_of_the_first_module(compare, session):
    recognizer = session.recognizer
    modules = {key: recognizer.modules[key] for key in reversed(TARGET)}
    order, batches = compare.inputs_of_first(
        modules, lambda: recognizer.forward("calibration", lambda _: None)
    )
    assert order == TARGET
    assert len(batches) == len(recognizer.batches)
    for (wavs,), expected in zip(batches, recognizer.batches, strict=True):
        assert torch.equal(wavs, expected)


def test_copies_of_the_modules_compute_the_same(compare, session):
    recognizer = session.recognizer
    wavs = recognizer.batches[0]
    expected = recognizer.forward("calibration", lambda _: None, True)
    calls = compare.Calls({key: recognizer.modules[key] for key in TARGET})
    assert torch.allclose(calls((wavs,)), expected, atol=1e-5)
    assert all(p.requires_grad for p in calls.parameters())
    # The recognizer's own are as they were, weight norm and all.
    again = recognizer.forward("calibration", lambda _: None, True)
    assert torch.equal(again, expected)


def test_modelopt_is_missing(compare, monkeypatch):
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"speechbrain_stablequant\[modelopt"):
        compare.main()


def test_budget_by_modelopt(compare, session):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    part = chosen(compare, session)
    for row in part["units"].values():
        at_4, at_8, at_16 = (o["harm"] for o in row["options"])
        assert at_4 > at_8 > at_16 == 0
    runs = session.recognizer.runs
    assert chosen(compare, session) == part
    # The scores are on disk.
    assert session.recognizer.runs == runs


def test_modelopt_scores_another_output(compare, session):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    # The recipe's log probabilities are those of warmer scores.
    head = session.recognizer.modules["ctc_lin"]
    handle = head.register_forward_hook(lambda *args: 2 * args[2])
    reference = session.recognizer.forward("calibration", lambda _: None, True)
    handle.remove()
    with pytest.raises(ValueError, match="called one after the other"):
        compare.auto_quantize_scores(
            {key: session.recognizer.modules[key] for key in TARGET},
            [(wavs,) for wavs in session.recognizer.batches],
            reference,
            session.layers,
            [4, 8],
            8,
            0,
        )
