"""Tests of speechbrain_stablequant.core.affine."""

import pytest
import torch

from speechbrain_stablequant.core.affine import (
    MIN_AMAX,
    dequantize,
    fake_quantize,
    qmax,
    quantize,
    scale_from_amax,
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
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_equals_torch_bit_for_bit(bits, axis):
    generator = torch.Generator().manual_seed(bits)
    scale = random_scales(generator, 40)
    rows = [awkward_values(s, generator, 15 * 31) for s in scale]
    x = torch.stack(rows).reshape(40, 15, 31).movedim(0, axis)
    expected = torch.stack(
        [
            torch.fake_quantize_per_tensor_affine(
                row, s.item(), 0, -qmax(bits), qmax(bits)
            )
            for row, s in zip(rows, scale, strict=True)
        ]
    )
    expected = expected.reshape(40, 15, 31).movedim(0, axis)
    q = quantize(x, scale, bits, axis=axis)
    assert q.shape == x.shape
    assert torch.equal(dequantize(q, scale, axis=axis), expected)
    assert torch.equal(fake_quantize(x, scale, bits, axis=axis), expected)


def test_reciprocal_matters():
    """A division would differ: the exactness tests do test something."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(0.3)
    x = awkward_values(scale, generator)
    divided = torch.round(x / scale).clamp(-127, 127).to(torch.int8)
    assert not torch.equal(divided, quantize(x, scale, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, 0])
def test_half_precision_computes_in_float32(dtype, axis):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.03, 0.11]) if axis == 0 else torch.tensor(0.03)
    x = torch.randn(2, 999, generator=generator).to(dtype)
    q = quantize(x, scale, 8, axis=axis)
    assert torch.equal(q, quantize(x.float(), scale, 8, axis=axis))


def test_fake_quantize_error_is_at_most_half_a_step():
    x = torch.linspace(-1, 1, 2001)
    for bits in ALL_BITS:
        scale = scale_from_amax(torch.tensor(1.0), bits)
        error = (fake_quantize(x, scale, bits) - x).abs().max()
        assert error <= scale / 2 * (1 + 1e-5)
