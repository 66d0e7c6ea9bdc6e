"""Tests of speechbrain_stablequant.core.weights."""

import pytest
import torch

from speechbrain_stablequant.core import weights
from speechbrain_stablequant.core.affine import (
    MIN_AMAX,
    fake_quantize,
    scale_from_amax,
)
from speechbrain_stablequant.core.weights import weight_amax

ALL_BITS = range(2, 9)


def weight_like(shape, seed=0):
    """Gaussian rows of different sizes, some with outliers, one dead."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=generator)
    flat = w.view(shape[0], -1)
    flat *= 10 ** (torch.rand(shape[0], 1, generator=generator) * 4 - 3)
    flat[::5, 0] *= 20
    flat[3] = 0
    return w


def row_errors(w, amax, bits):
    """Squared error of each output channel."""
    scale = scale_from_amax(amax, bits)
    difference = fake_quantize(w, scale, bits, axis=0) - w
    return difference.double().square().flatten(1).sum(1)


@pytest.mark.parametrize("shape", [(12, 64), (12, 4, 3)])
def test_weight_max(shape):
    w = weight_like(shape)
    amax = weight_amax(w, 8, "max")
    expected = [max(MIN_AMAX, float(row.abs().max())) for row in w]
    assert amax.dtype == torch.float32
    assert amax.tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", [(24, 1024), (24, 16, 8), (24, 1, 10)])
def test_weight_mse_against_brute_force(shape, bits):
    w = weight_like(shape)
    amax = weight_amax(w, bits, "mse")
    top = weight_amax(w, bits, "max")
    assert amax.shape == (24,) and (amax <= top).all()
    errors = row_errors(w, amax, bits)
    brute = torch.full((24,), float("inf"), dtype=torch.float64)
    for fraction in torch.linspace(0.001, 1, 1000):
        brute = brute.minimum(row_errors(w, top * fraction, bits))
    live = torch.arange(24) != 3
    assert amax[3] == pytest.approx(MIN_AMAX) and errors[3] == 0
    ratio = errors[live] / brute[live]
    assert ratio.max() < 1.01
    # Never worse than max, whatever the channel.
    assert (errors <= row_errors(w, top, bits) * (1 + 1e-5)).all()


def test_weight_mse_beats_max_where_there_are_outliers():
    w = weight_like((24, 1024))
    better = row_errors(w, weight_amax(w, 4, "mse"), 4)
    worse = row_errors(w, weight_amax(w, 4, "max"), 4)
    assert better[5] < 0.5 * worse[5]


def test_weight_chunks_do_not_show(monkeypatch):
    w = weight_like((37, 50))
    whole = weight_amax(w, 6, "mse")
    monkeypatch.setattr(weights, "_CHUNK_CPU", 50 * 4)
    assert torch.equal(weight_amax(w, 6, "mse"), whole)


@pytest.mark.parametrize("method", ["max", "mse"])
def test_weight_of_half_precision(method):
    w = weight_like((12, 4, 3)).half()
    expected = weight_amax(w.float(), 6, method)
    assert torch.equal(weight_amax(w, 6, method), expected)


def test_weight_leaves_its_input_alone():
    w = weight_like((12, 64)).requires_grad_()
    before = w.detach().clone()
    amax = weight_amax(w, 4, "mse")
    assert torch.equal(w, before) and not amax.requires_grad


def test_weight_refuses():
    w = torch.ones(2, 3)
    with pytest.raises(ValueError, match="bits must be"):
        weight_amax(w, 1, "max")
    w[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        weight_amax(w, 8, "max")
