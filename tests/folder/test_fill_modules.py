"""Tests of speechbrain_stablequant.folder.fill_modules."""

import copy

import pytest
import torch
from small_model import QUANT, Small, plan_of, small_model

from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.folder.fill_modules import fill_modules
from speechbrain_stablequant.folder.live_modules import LiveModules
from speechbrain_stablequant.folder.stored_floats import float_state
from speechbrain_stablequant.folder.weights_file import (
    load_checkpoint,
    save_checkpoint,
)
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.simulation.fake_quant import Simulator
from speechbrain_stablequant.utils.patching import shadowed_forwards

ATTENTION = "m.attention"


def saved(folder, integers, layers, model):
    """What is read from a file of these integers."""
    quantized = [layer for layer in layers if layer.name in integers]
    floats = float_state({"m": model}, integers)
    save_checkpoint(folder, plan_of(quantized), integers, floats, "float32")
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
