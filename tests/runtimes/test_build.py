"""Tests of speechbrain_stablequant.runtimes.build without an encoder."""

import copy
import logging

import pytest
import torch
from torch import nn

from speechbrain_stablequant.core.integer_layer import integer_layer
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.simulation.fake_quant import Simulator
from speechbrain_stablequant.utils.patching import shadowed_forwards


class Small(nn.Module):
    """Each kind of layer."""

    def __init__(self):
        super().__init__()
        self.plane = nn.Conv2d(1, 4, (3, 3), stride=(2, 1), padding=(0, 1))
        self.mix = nn.Conv1d(64, 32, 3, padding=1)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.plane(x[:, None]).permute(0, 1, 3, 2).flatten(1, 2)
        x = self.mix(x).transpose(1, 2)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def quantized(small):
    """Few bits, which every CPU multiplies exactly."""
    layers = find_layers({"m": small}, ["m"])
    quants = {layer.name: LayerQuant(6, 8, 2.0) for layer in layers}
    integers = {
        layer.name: integer_layer(layer, quants[layer.name]) for layer in layers
    }
    x = torch.randn(2, 17, 16)
    with torch.no_grad(), Simulator(layers).apply(quants):
        expected = small(x)
    return integers, x, expected


@pytest.mark.parametrize("backend", ["torch", "torch_int8"])
def test_every_kind_is_executed(small, quantized, backend, caplog):
    integers, x, expected = quantized
    with caplog.at_level(logging.WARNING):
        forwards = build_forwards(backend, {"m": small}, integers)
    assert "m.plane (1 layers): two-dimensional convolutions" in caplog.text
    with torch.no_grad():
        plain = small(x)
        with shadowed_forwards(forwards):
            found = small(x)
    error = (found - expected).abs().max()
    assert error < 0.1 * (plain - expected).abs().max()
    assert error < 0.02 * expected.abs().max()


def test_installed_forwards_need_no_float_weights(small, quantized):
    """As a folder has them: forever, in copies, without the float weights."""
    integers, x, expected = quantized
    forwards = build_forwards("torch_int8", {"m": small}, integers)
    for module, forward in forwards.items():
        module.forward = forward
    with torch.no_grad():
        for module in (small.attention, small.attention.out_proj, small.head):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("weight"):
                    parameter.fill_(torch.nan)
        for model in (small, copy.deepcopy(small)):
            error = (model(x) - expected).abs().max()
            assert error < 0.02 * expected.abs().max()
