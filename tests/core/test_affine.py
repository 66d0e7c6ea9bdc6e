"""Tests of speechbrain_stablequant.core.affine."""

import pytest
import torch

from speechbrain_stablequant.core import affine
from speechbrain_stablequant.core.affine import (
    MIN_AMAX,
    dequantize,
    fake_quantize,
    qmax,
    quantize,
    scale_from_amax,
    weight_amax,
)

ALL_BITS = range(2, 9)


def awkward_values(scale, generator, n=4099):
    """Random values, exact ties and values far outside of the range."""
    x = torch.randn(n, generator=generator) * 60 * scale
    ties = torch.randint(-140, 140, (n // 3,), generator=generator) + 0.5
    x[: n // 3] = ties * scale
    x[-4:] = torch.tensor([0.0, -0.0, 1e6, -1e6]) * scale
    return x


def random_scales(generator, n):
    """Log-uniform scales from 1e-9 to 1e3."""
    exponent = torch.rand(n, generator=generator) * 12 - 9
    return 10.0**exponent


def test_qmax():
    assert [qmax(b) for b in ALL_BITS] == [1, 3, 7, 15, 31, 63, 127]


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 8.0, "8", True, None])
def test_qmax_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="bits must be") as error:
        qmax(bits)
    assert "\n" not in str(error.value)


def test_scale_from_amax():
    amax = torch.tensor([[12.7, 0.0], [MIN_AMAX / 10, 1.0]])
    scale = scale_from_amax(amax, 8)
    assert scale.dtype == torch.float32 and scale.shape == amax.shape
    floor = torch.tensor(MIN_AMAX) / 127
    assert torch.equal(scale[0, 0], torch.tensor(12.7) / 127)
    assert torch.equal(scale[0, 1], floor)
    assert torch.equal(scale[1, 0], floor)
    assert scale_from_amax(torch.tensor(3.0), 3).item() == 1.0
    assert scale_from_amax(amax.double(), 4).dtype == torch.float32


def test_scale_keeps_its_dead_channel_usable():
    # The reciprocal of the smallest scale must not overflow float32.
    scale = scale_from_amax(torch.tensor(0.0), 8)
    assert torch.isfinite(1 / scale)
    assert quantize(torch.zeros(3), scale, 8).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scale_refuses_bad_amax(bad):
    with pytest.raises(ValueError, match="amax must be finite") as error:
        scale_from_amax(torch.tensor([1.0, bad]), 8)
    assert "\n" not in str(error.value)


def test_quantize_by_hand():
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 99.0, -99.0, 1.0])
    q = quantize(x, torch.tensor([0.5]), 3)
    assert q.dtype == torch.int8
    assert q.tolist() == [0, 2, 2, 0, -2, 3, -3, 2]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_per_tensor_equals_torch_bit_for_bit(bits):
    generator = torch.Generator().manual_seed(bits)
    for scale in random_scales(generator, 40):
        x = awkward_values(scale, generator)
        q = quantize(x, scale, bits)
        expected = torch.fake_quantize_per_tensor_affine(
            x, scale.item(), 0, -qmax(bits), qmax(bits)
        )
        assert q.abs().max() == qmax(bits)
        assert torch.equal(dequantize(q, scale), expected)
        assert torch.equal(fake_quantize(x, scale, bits), expected)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_per_channel_equals_torch_bit_for_bit(bits):
    generator = torch.Generator().manual_seed(bits)
    scale = random_scales(generator, 40)
    rows = [awkward_values(s, generator, 15 * 31) for s in scale]
    x = torch.stack(rows).reshape(40, 15, 31)
    expected = torch.fake_quantize_per_channel_affine(
        x, scale, torch.zeros(40).int(), 0, -qmax(bits), qmax(bits)
    )
    q = quantize(x, scale, bits)
    assert q.shape == x.shape
    assert torch.equal(dequantize(q, scale), expected)
    assert torch.equal(fake_quantize(x, scale, bits), expected)


def test_reciprocal_matters():
    """A division would differ: the exactness tests do test something."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(0.3)
    x = awkward_values(scale, generator)
    divided = torch.round(x / scale).clamp(-127, 127).to(torch.int8)
    assert not torch.equal(divided, quantize(x, scale, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.03, [0.03, 0.11]])
def test_half_precision_computes_in_float32(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(scale)
    x = torch.randn(2, 999, generator=generator).to(dtype)
    assert torch.equal(quantize(x, scale, 8), quantize(x.float(), scale, 8))


def test_fake_quantize_error_is_at_most_half_a_step():
    x = torch.linspace(-1, 1, 2001)
    for bits in ALL_BITS:
        scale = scale_from_amax(torch.tensor(1.0), bits)
        error = (fake_quantize(x, scale, bits) - x).abs().max()
        assert error <= scale / 2 * (1 + 1e-5)


# -- weights -----------------------------------------------------------------


def weight_like(shape, seed=0):
    """Gaussian rows of different sizes, some with outliers, one dead."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=generator)
    flat = w.view(shape[0], -1)
    flat *= 10 ** (torch.rand(shape[0], 1, generator=generator) * 4 - 3)
    flat[::5, 0] *= 20
    flat[3] = 0
    return w


def row_errors(w, amax, bits, energy=1.0):
    """Squared error of each output channel, of inputs of some energy."""
    scale = scale_from_amax(amax, bits)
    difference = fake_quantize(w, scale, bits) - w
    return (difference.double().square().flatten(1) * energy).sum(1)


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


def test_weight_mse_of_outputs():
    """The energy of inputs decides, up to a common factor."""
    w = weight_like((24, 64))
    same = torch.full((64,), 9.0)
    assert torch.allclose(
        weight_amax(w, 4, "mse", same), weight_amax(w, 4, "mse")
    )
    energy = torch.rand(64) ** 8
    best = weight_amax(w, 4, "mse", energy)
    top = weight_amax(w, 4, "max")
    for fraction in torch.linspace(0.01, 1, 100):
        assert (
            row_errors(w, best, 4, energy)
            <= row_errors(w, top * fraction, 4, energy) * (1 + 1e-5)
        ).all()


def test_weight_chunks_do_not_show(monkeypatch):
    w = weight_like((37, 50))
    whole = weight_amax(w, 6, "mse", torch.arange(50))
    monkeypatch.setattr(affine, "_CHUNK_CPU", 50 * 4)
    assert torch.equal(weight_amax(w, 6, "mse", torch.arange(50)), whole)


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
