"""Tests of weights that are stored as integers alone, and of their storage."""

from dataclasses import replace

import pytest
import torch
from small_model import plan_of
from speechbrain.nnet.RNN import LSTM, LiGRU
from torch import nn

from speechbrain_stablequant.core.plan import QuantizationPlan
from speechbrain_stablequant.folder.stored_floats import (
    float_state,
    loaded_floats,
    rounded_floats,
    stored_floats,
)
from speechbrain_stablequant.folder.weights_file import (
    load_checkpoint,
    save_checkpoint,
)
from speechbrain_stablequant.model.layers import (
    find_layers,
    weight_only_parameters,
)

LSTM_WEIGHTS = {"m.rnn.rnn.weight_ih_l0", "m.rnn.rnn.weight_hh_l0"}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(300, 64)
        self.few = nn.Embedding(10, 64)
        self.rnn = LSTM(hidden_size=64, input_size=64)
        self.light = LiGRU(hidden_size=96, input_shape=(2, 5, 64))
        self.out = nn.Linear(96, 7)

    def forward(self, tokens):
        x, _ = self.rnn(self.emb(tokens) + self.few(tokens % 10))
        x, _ = self.light(x)
        return self.out(x)


@pytest.fixture
def modules():
    torch.manual_seed(0)
    return {"m": Recurrent().eval()}


def test_what_is_weight_only(modules):
    found = weight_only_parameters(modules, ["m"])
    light = "m.light.rnn.0.u.weight"
    assert set(found) == {"m.emb.weight", *LSTM_WEIGHTS, light}
    # The recurrent product of a LiGRU is no layer; its other one is.
    layers = [layer.name for layer in find_layers(modules, ["m"])]
    assert layers == ["m.light.rnn.0.w", "m.out"]


def test_patterns(modules):
    found = weight_only_parameters(
        modules, ["m"], ["m.rnn.*", "m.e*"], ["*_hh*"]
    )
    assert found == ["m.emb.weight", "m.rnn.rnn.weight_ih_l0"]


def test_stored_as_evaluated(modules, tmp_path):
    names = weight_only_parameters(modules, ["m"])
    plan = replace(plan_of([]), weight_only=names)
    floats = float_state(modules, [])
    before = {name: x.clone() for name, x in floats.items()}
    save_checkpoint(tmp_path, plan, {}, floats, "float16")
    found = load_checkpoint(tmp_path)
    assert found.plan.weight_only == names
    assert found.floats.keys() == floats.keys()
    tokens = torch.randint(300, (2, 5))
    with torch.no_grad(), rounded_floats(modules, [], "float16", names):
        for name, x in float_state(modules, []).items():
            assert torch.equal(x, found.floats[name]), name
        expected = modules["m"](tokens)
    for name, x in float_state(modules, []).items():
        assert torch.equal(x, before[name])
    twin = Recurrent().eval()
    state = {n.removeprefix("m."): x for n, x in found.floats.items()}
    twin.load_state_dict(state, assign=True)
    with torch.no_grad():
        assert torch.equal(twin(tokens), expected)
        assert not torch.equal(modules["m"](tokens), expected)


def test_integers_are_stored(modules):
    names = weight_only_parameters(modules, ["m"])
    stored = stored_floats({}, float_state(modules, []), "float16", names)
    for name in names:
        assert stored[name].dtype == torch.int8
        rows = len(stored[name])
        assert stored[f"{name}.row_scale"].shape == (rows,)
    error = loaded_floats(stored, stored.get)["m.emb.weight"]
    error = (error - modules["m"].emb.weight).abs().amax(1)
    assert (error <= 0.51 * stored["m.emb.weight.row_scale"]).all()


@pytest.mark.parametrize(
    "scale", [torch.ones(299), torch.zeros(300), torch.full((300,), torch.inf)]
)
def test_a_wrong_scale(modules, scale):
    names = weight_only_parameters(modules, ["m"])
    stored = stored_floats({}, float_state(modules, []), "float16", names)
    stored["m.emb.weight.row_scale"] = scale
    with pytest.raises(ValueError, match=r"no scale of 'm\.emb\.weight'"):
        loaded_floats(stored, stored.get)


def test_a_plan_names_them(modules, tmp_path):
    path = tmp_path / "plan.json"
    plan_of([]).save(path)
    assert "weight_only" not in path.read_text()
    plan = replace(plan_of([]), weight_only=["m.emb.weight"])
    plan.save(path)
    loaded = QuantizationPlan.load(path)
    assert loaded == plan
    loaded.check_fits([], modules, str(path))
    with pytest.raises(ValueError, match=r"'x\.emb\.weight' is not"):
        replace(plan, weight_only=["x.emb.weight"]).check_fits([], modules, "p")
