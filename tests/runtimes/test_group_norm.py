"""GroupNorm over time from the windows of the wave."""

import pytest
import torch
from torch.nn import functional as F

from speechbrain_stablequant.core.encoder_spec import ConvSpec, Norm
from speechbrain_stablequant.core.integer_layer import FloatLayer, IntegerLayer
from speechbrain_stablequant.runtimes.group_norm import gain_and_shift
from speechbrain_stablequant.runtimes.reference import apply_layer

CHANNELS = 6


def norm() -> Norm:
    return Norm(torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS), 1e-5, True)


def integer_conv(bias: torch.Tensor | None) -> IntegerLayer:
    return IntegerLayer(
        "conv",
        "conv1d",
        torch.randint(-127, 128, (CHANNELS, 1, 10), dtype=torch.int8),
        torch.rand(CHANNELS) * 0.01 + 0.001,
        8,
        torch.tensor([0.02]),
        8,
        bias,
        stride=5,
    )


def float_conv(bias: torch.Tensor | None, **geometry) -> FloatLayer:
    weight = torch.randn(CHANNELS, 1, 10)
    return FloatLayer("conv", "conv1d", weight, bias, stride=5, **geometry)


@pytest.mark.parametrize("make", [integer_conv, float_conv])
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_group_norm(make, with_bias):
    stage = ConvSpec(make(torch.randn(CHANNELS) if with_bias else None), norm())
    # Speech is not centered, not white and of changing loudness.
    wavs = torch.randn(3, 4003).cumsum(1) * 0.02 + 0.3
    out = apply_layer(stage.conv, wavs[:, None])
    expected = F.group_norm(
        out, CHANNELS, stage.norm.weight, stage.norm.bias, stage.norm.eps
    )
    gain, shift = gain_and_shift(stage, wavs)
    assert gain.shape == shift.shape == (3, CHANNELS)
    assert gain.dtype == shift.dtype == torch.float32
    ours = out * gain[:, :, None] + shift[:, :, None]
    assert torch.allclose(ours, expected, atol=2e-4)


def test_silence_is_finite():
    stage = ConvSpec(integer_conv(None), norm())
    gain, shift = gain_and_shift(stage, torch.zeros(1, 400))
    assert torch.allclose(gain, stage.norm.weight / stage.norm.eps**0.5)
    assert torch.equal(shift[0], stage.norm.bias)


def test_the_last_samples_without_a_window_are_not_seen():
    stage = ConvSpec(integer_conv(torch.randn(CHANNELS)), norm())
    wavs = torch.randn(1, 4003)
    changed = wavs.clone()
    changed[:, 4000:] = 100.0
    for one, other in zip(
        gain_and_shift(stage, wavs), gain_and_shift(stage, changed), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("geometry", [{"padding": 2}, {"dilation": 2}])
def test_other_windows_are_refused(geometry):
    stage = ConvSpec(float_conv(None, **geometry), norm())
    with pytest.raises(ValueError, match="conv: GroupNorm is supported after"):
        gain_and_shift(stage, torch.zeros(1, 400))
