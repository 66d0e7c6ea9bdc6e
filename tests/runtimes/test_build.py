"""Tests of speechbrain_stablequant.runtimes.build without an encoder."""

import copy
import logging

import pytest
import torch
from small_model import QUANT, small_model

from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.simulation.fake_quant import Simulator
from speechbrain_stablequant.utils.patching import shadowed_forwards


@pytest.fixture
def small():
    """Model, integers, input and what the simulation makes of it."""
    model, layers, integers = small_model()
    x = torch.randn(2, 17, 16)
    quants = {layer.name: QUANT for layer in layers}
    with torch.no_grad(), Simulator(layers).apply(quants):
        return model, integers, x, model(x)


@pytest.mark.parametrize("backend", ["torch", "torch_int8"])
def test_every_kind_is_executed(small, backend, caplog):
    model, integers, x, expected = small
    with caplog.at_level(logging.WARNING):
        forwards = build_forwards(backend, {"m": model}, integers)
    assert "m.plane (1 layers): two-dimensional convolutions" in caplog.text
    with torch.no_grad():
        plain = model(x)
        with shadowed_forwards(forwards):
            found = model(x)
    error = (found - expected).abs().max()
    assert error < 0.1 * (plain - expected).abs().max()
    assert error < 0.02 * expected.abs().max()


def test_installed_forwards_need_no_float_weights(small):
    """As a folder has them: forever, in copies, without the float weights."""
    model, integers, x, expected = small
    forwards = build_forwards("torch_int8", {"m": model}, integers)
    for module, forward in forwards.items():
        module.forward = forward
    with torch.no_grad():
        for module in (model.attention, model.attention.out_proj, model.head):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("weight"):
                    parameter.fill_(torch.nan)
        for one in (model, copy.deepcopy(model)):
            error = (one(x) - expected).abs().max()
            assert error < 0.02 * expected.abs().max()
