"""Tests of speechbrain_stablequant.core.integer_layer."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from speechbrain_stablequant.core.affine import fake_quantize, weight_scale
from speechbrain_stablequant.core.integer_layer import (
    float_layer,
    integer_product,
    layer_geometry,
    reference_forward,
)
from speechbrain_stablequant.core.layer_quant import LayerQuant, LayerTensors
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.model.layer import Layer
from speechbrain_stablequant.simulation.fake_quant import Simulator

CASES = {
    "linear": (lambda: nn.Linear(48, 20), (3, 7, 48)),
    "no bias": (lambda: nn.Linear(48, 20, bias=False), (5, 48)),
    "conv": (lambda: nn.Conv1d(16, 24, 5, 2, 3, 2), (2, 16, 61)),
    "groups": (lambda: nn.Conv1d(16, 16, 8, 1, 4, groups=4), (2, 16, 40)),
    "weight norm": (
        lambda: parametrizations.weight_norm(
            nn.Conv1d(16, 16, 8, 1, 4, groups=4), dim=2
        ),
        (2, 16, 40),
    ),
}


def make(name: str, bits: int, method: str = "max"):
    """A layer, an input that its range cuts, and its quantization."""
    build, shape = CASES[name]
    torch.manual_seed(len(name) + bits)
    module, x = build(), torch.randn(shape)
    quant = LayerQuant(bits, bits, 0.7 * x.abs().max().item(), method)
    kind = "linear" if isinstance(module, nn.Linear) else "conv1d"
    return Layer("a.b", module, kind, "head"), x, quant


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("name", CASES)
def test_weight_is_that_of_the_simulation(name, bits, method):
    layer, _, quant = make(name, bits, method)
    integers = integer_layer(layer, quant)
    weight = layer.module.weight.detach()
    scale = weight_scale(weight, bits, method)
    assert integers.weight.dtype == torch.int8
    assert integers.weight.abs().max() <= 2 ** (bits - 1) - 1
    simulated = fake_quantize(weight, scale, bits)
    assert torch.equal(integers.float_weight(), simulated)
    assert torch.equal(integers.weight_scale, scale)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_integers_compute_what_is_simulated(name, bits):
    layer, x, quant = make(name, bits)
    with Simulator([layer]).apply({"a.b": quant}):
        expected = layer.module(x)
    out = reference_forward(integer_layer(layer, quant), x)
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_largest_sums_are_exact():
    linear = nn.Linear(4096, 2, bias=False)
    linear.weight.data[:] = torch.tensor([[1.0], [-1.0]])
    layer = integer_layer(
        Layer("a", linear, "linear", "head"), LayerQuant(8, 8, 1.0)
    )
    q = torch.full((1, 4096), 127, dtype=torch.int8)
    expected = [[4096 * 127 * 127, -4096 * 127 * 127]]
    assert integer_product(layer, q).tolist() == expected


def test_conv_geometry_is_kept():
    layer, _, quant = make("conv", 8)
    integers = integer_layer(layer, quant)
    floats = float_layer("a.b", layer.module)
    for one in (integers, floats):
        assert (one.stride, one.padding, one.dilation) == (2, 3, 2)
        assert one.kind == "conv1d"
    assert torch.equal(floats.weight, layer.module.weight)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(2, 2, 3, padding="same"),
        nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_other_padding_is_refused(conv):
    with pytest.raises(ValueError, match=r"quantize\.exclude"):
        layer_geometry(conv)


def test_on_the_device_of_its_module():
    layer, _, quant = make("linear", 8)
    own = integer_layer(layer, quant)
    layer.module.to("meta")
    made = integer_layer(
        layer, quant, LayerTensors(own.weight, own.weight_scale)
    )
    for part in ("weight", "weight_scale", "activation_scale", "bias"):
        assert getattr(made, part).is_meta


def test_on_another_device():
    layer, _, quant = make("linear", 8)
    made = integer_layer(layer, quant)
    moved = made.to("meta")
    for part in ("weight", "weight_scale", "activation_scale", "bias"):
        assert getattr(moved, part).is_meta
        assert not getattr(made, part).is_meta
    # One in its file is not read for the CPU.
    unread = replace(made, weight=moved.weight, read=lambda: made.weight)
    assert unread.to("cpu") is unread
    assert unread.to("meta").read is None
