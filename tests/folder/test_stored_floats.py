"""Tests of speechbrain_stablequant.folder.stored_floats."""

import copy

import pytest
import torch
from small_model import QUANT, Small, plan_of, small_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from speechbrain_stablequant.core.affine import FLOAT_BITS
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.folder.live_modules import LiveModules
from speechbrain_stablequant.folder.stored_floats import (
    fill_modules,
    float_state,
    rounded_weights,
)
from speechbrain_stablequant.folder.weights_file import (
    load_checkpoint,
    save_checkpoint,
)
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.simulation.fake_quant import Simulator
from speechbrain_stablequant.utils.patching import shadowed_forwards

ATTENTION = "m.attention"
ALONE = LayerQuant(4, FLOAT_BITS, 0.0, "mse")


def saved(folder, integers, layers, model, quant=QUANT):
    """What is read from a file of these integers."""
    quantized = [layer for layer in layers if layer.name in integers]
    plan, floats = (
        plan_of(quantized, quant),
        float_state({"m": model}, integers),
    )
    save_checkpoint(folder, plan, integers, floats, "float32")
    return load_checkpoint(folder)


def computed(integers, model, x):
    forwards = build_forwards("torch", {"m": model}, integers)
    with torch.no_grad(), shadowed_forwards(forwards):
        return model(x)


def test_each_kind_is_stored_and_loaded(tmp_path):
    model, layers, integers = small_model()
    found = saved(tmp_path, integers, layers, model)
    x = torch.randn(2, 17, 16)
    quants = {layer.name: QUANT for layer in layers}
    with torch.no_grad(), Simulator(layers).apply(quants):
        expected = model(x)
    floats = {name for name in found.floats if name.endswith("weight")}
    assert floats == set()  # no weight is stored twice
    empty = Small().eval()
    fill_modules({"m": empty}, found.integers, found.floats, tmp_path)
    got = computed(found.integers, empty, x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    plane = found.integers["m.plane"]
    assert (plane.stride, plane.padding) == ((1, 2), (1, 0))


def test_freed_weights_compute_nothing(tmp_path):
    """Not even zeros, if a runtime was forgotten."""
    model, layers, integers = small_model()
    del integers["m.plane"], integers["m.mix"], integers["m.head"]
    found = saved(tmp_path, integers, layers, model)
    fill_modules({"m": model}, found.integers, found.floats, tmp_path)
    assert model(torch.randn(2, 17, 16)).isnan().all()


def test_a_weight_of_which_rows_stay_float_is_kept(tmp_path):
    model, layers, integers = small_model()
    del integers[f"{ATTENTION}.in_proj_q"]
    found = saved(tmp_path, integers, layers, model)
    assert f"{ATTENTION}.in_proj_weight" in found.floats
    x = torch.randn(2, 17, 16)
    expected = computed(integers, model, x)
    empty = Small().eval()
    fill_modules({"m": empty}, found.integers, found.floats, tmp_path)
    got = computed(found.integers, empty, x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_another_attention_does_not_fit(tmp_path):
    model, layers, integers = small_model()
    found = saved(tmp_path, integers, layers, model)
    other = Small()
    other.attention = torch.nn.MultiheadAttention(32, 4, kdim=8)
    with pytest.raises(CheckpointError, match="in_proj_kv"):
        fill_modules({"m": other}, found.integers, found.floats, tmp_path)


def test_live_modules_compute_products_of_attention(tmp_path):
    """Also a copy, which reads the folder itself."""
    model, layers, integers = small_model()
    found = saved(tmp_path, integers, layers, model)
    x = torch.randn(2, 17, 16)
    expected = computed(integers, model, x)
    empty = Small().eval()
    live = LiveModules({"m": empty}, [empty], "torch", {})
    live.load(found, lambda: load_checkpoint(tmp_path), tmp_path)
    for one in (live, copy.deepcopy(live)):
        with torch.no_grad():
            got = one.modules["m"](x)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert one.runtime == "torch"


@pytest.mark.parametrize("normed", [False, True])
def test_weight_only_layers_are_float_parameters(tmp_path, normed):
    """In a run and from the folder, with no forward of a runtime."""

    def made():
        model = Small().eval()
        if normed:
            weight_norm(model.mix, dim=2)
        return model

    torch.manual_seed(0)
    model, empty = made(), made()
    nn.init.normal_(model.attention.in_proj_bias)
    layers = find_layers({"m": model}, ["m"])
    integers = {x.name: integer_layer(x, ALONE) for x in layers}
    integers[f"{ATTENTION}.in_proj_q"].bias.add_(1.0)  # as training may
    x = torch.randn(2, 17, 16)
    with torch.no_grad():
        before = model(x)
        with rounded_weights({"m": model}, integers):
            expected = model(x)
        assert torch.equal(model(x), before)
    assert (expected - before).abs().max() > 1e-3
    found = saved(tmp_path, integers, layers, model, ALONE)
    assert not {n for n in found.floats if n.endswith("weight")}
    live = LiveModules({"m": empty}, [empty], "torch", {})
    live.load(found, lambda: load_checkpoint(tmp_path), tmp_path)
    assert build_forwards("torch", {"m": empty}, found.integers) == {}
    for one in (live, copy.deepcopy(live)):
        module = one.modules["m"]
        assert not any("forward" in vars(part) for part in module.modules())
        with torch.no_grad():
            assert torch.equal(module(x), expected)


def test_a_tied_weight_keeps_two_values():
    tied = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    tied["two"].weight = tied["one"].weight
    (_, layer) = find_layers({"m": tied}, ["m"])
    integers = {layer.name: integer_layer(layer, ALONE)}
    x = torch.randn(3, 8)
    one, two = tied["one"](x), tied["two"](x)
    with rounded_weights({"m": tied}, integers):
        assert torch.equal(tied["one"](x), one)
        assert not torch.equal(tied["two"](x), two)
