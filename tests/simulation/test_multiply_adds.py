"""Tests of simulation.multiply_adds and of core.account, which sums it up."""

from dataclasses import replace

import pytest
import torch
from small_model import plan_of, small_model
from speechbrain.nnet.RNN import LSTM
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from speechbrain_stablequant.core.account import account
from speechbrain_stablequant.core.affine import FLOAT_BITS
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.model.layers import (
    find_layers,
    weight_only_parameters,
)
from speechbrain_stablequant.simulation.multiply_adds import (
    NO_WEIGHT,
    count_multiply_adds,
)

B, T, F = 2, 17, 16


def test_each_layer_and_the_attention():
    model, layers, _ = small_model()
    x = torch.randn(B, T, F)
    found = count_multiply_adds(layers, {"m": model}, lambda: model(x))
    assert found == {
        "m.plane": B * T * 7 * 4 * 9,
        "m.mix": B * T * 32 * 28 * 3,
        "m.attention.in_proj_q": B * T * 32 * 32,
        "m.attention.in_proj_kv": B * T * 32 * 64,
        "m.attention.out_proj": B * T * 32 * 32,
        "m.head": B * T * 32 * 5,
        NO_WEIGHT: 2 * B * T * T * 32,
    }
    assert "forward" not in vars(model.attention)


def test_an_excluded_attention_is_counted():
    model, _, _ = small_model()
    layers = find_layers({"m": model}, ["m"], exclude=["m.attention.*"])
    x = torch.randn(B, T, F)
    found = count_multiply_adds(layers, {"m": model}, lambda: model(x))
    assert found["m.attention.in_proj_weight"] == B * T * 32 * 96
    assert found["m.attention.out_proj.weight"] == B * T * 32 * 32


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = LSTM(64, input_size=64, num_layers=2, bidirectional=True)
        self.conv = weight_norm(nn.Conv1d(128, 8, 5), dim=2)
        self.cell = nn.GRUCell(8, 40)
        self.mixed = nn.Parameter(torch.randn(40, 60))

    def forward(self, x):
        x = self.conv(self.rnn(x)[0].transpose(1, 2))
        x = self.cell(x.mean(2))
        return torch.einsum("bi,io->bo", x, self.mixed)


@pytest.fixture
def recurrent():
    torch.manual_seed(0)
    model = Recurrent().eval()
    modules = {"m": model}
    layers = find_layers(modules, ["m"])
    x = torch.randn(B, T, 64)
    products = count_multiply_adds(layers, modules, lambda: model(x))
    return modules, layers, products


def test_what_is_no_layer(recurrent):
    modules, _, products = recurrent
    rnn = modules["m"].rnn.rnn
    for name, weight in rnn.named_parameters():
        if weight.dim() == 2:
            assert products[f"m.rnn.rnn.{name}"] == B * T * weight.numel()
    assert products["m.conv"] == B * (T - 4) * 8 * 128 * 5
    assert products["m.cell.weight_ih"] == B * 120 * 8
    assert products["m.mixed"] == B * 40 * 60


def test_a_module_behind_two_keys_has_its_first_name():
    linear = nn.Linear(4, 3)
    modules = {"a": linear, "b": linear}
    x = torch.ones(2, 4)
    products = count_multiply_adds([], modules, lambda: linear(x))
    assert products == {"a.weight": 24}
    found = account(plan_of([]), modules, products)
    assert found["largest_float"][0]["products"] == 24


def test_account_of_a_module_quantized_under_its_second_key():
    linear, table = nn.Linear(4, 3, bias=False), nn.Embedding(200, 100)
    modules = {"a": nn.Sequential(linear, table)}
    modules["b"] = nn.Sequential(linear, table)
    layers = find_layers(modules, ["b"])
    names = weight_only_parameters(modules, ["b"])
    assert names == ["b.1.weight"]
    plan = replace(plan_of(layers), weight_only=names)
    found = account(plan, modules)["parameters"]
    assert found == {"quantized": 12, "weight_only": 20000, "float": 0}


def test_account(recurrent):
    modules, layers, products = recurrent
    names = weight_only_parameters(modules, ["m"])
    plan = replace(plan_of(layers), weight_only=names)
    found = account(plan, modules, products)
    rnn = modules["m"].rnn.rnn
    held = sum(p.numel() for p in rnn.parameters() if p.dim() == 2)
    assert found["parameters"]["quantized"] == 8 * 128 * 5
    assert found["parameters"]["weight_only"] == held
    assert found["products"]["quantized"] == products["m.conv"]
    assert found["products"]["weight_only"] == B * T * held
    assert sum(found["products"].values()) == sum(products.values())
    why = {row["name"]: row["why"] for row in found["largest_float"]}
    assert why["m.cell.weight_hh"] == "too small for integers to pay"
    assert why["biases and normalizations"].startswith("added")
    assert why["m.mixed"] == "no product that is known by its module"
    without = account(replace(plan, weight_only=[]), modules, products)
    (row,) = (
        row
        for row in without["largest_float"]
        if row["name"] == "m.rnn.rnn.weight_hh_l0"
    )
    assert row["why"] == "excluded, or not below quantize.target"


def test_account_of_weights_alone():
    model, layers, _ = small_model()
    plan = plan_of(layers, LayerQuant(4, FLOAT_BITS, 0.0))
    products = dict.fromkeys((layer.name for layer in layers), 7)
    found = account(plan, {"m": model}, products)
    held = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert found["parameters"]["quantized"] == 0
    assert found["parameters"]["weight_only"] == held
    assert found["products"]["weight_only"] == 7 * len(layers)


def test_account_of_rows():
    model, layers, _ = small_model()
    plan = plan_of(layers)
    rows = [
        replace(row, quant=None, reason="it lost")
        if row.name == "m.attention.in_proj_q"
        else row
        for row in plan.layers
    ]
    found = account(replace(plan, layers=rows), {"m": model})
    whole = sum(p.numel() for p in model.parameters())
    assert sum(found["parameters"].values()) == whole
    assert found["products"] is None
    row = found["largest_float"][0]
    assert row["name"] == "m.attention.in_proj_weight"
    assert (row["parameters"], row["why"]) == (32 * 32, "it lost")
