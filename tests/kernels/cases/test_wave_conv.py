"""The first convolution, and the exact sums of its GroupNorm."""

import pytest
import torch
from torch.nn import functional as F

from speechbrain_stablequant.kernels import wave_conv

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

#: batch, samples, out, kernel, stride
GEOMETRIES = [
    (1, 10, 8, 10, 5),
    (2, 333, 24, 10, 5),
    (3, 170, 48, 3, 2),
    (1, 700, 17, 40, 20),
]
WAVE = (float(1.0 / torch.tensor(3.0 / 127)), 127)


KINDS = [torch.int8, torch.float16, torch.float32]


def _inputs(geometry, kind=torch.int8):
    batch, samples, columns, kernel, _ = geometry
    wave = torch.randn(batch, samples)
    if kind == torch.int8:
        weight = torch.randint(-127, 128, (columns, kernel), dtype=kind)
        scale = torch.rand(columns) * 1e-3
    else:
        weight, scale = (
            torch.randn(columns, kernel).to(kind),
            torch.ones(columns),
        )
    return wave, weight, scale, torch.randn(columns)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_convolution(geometry, has_norm, dtype, kind, surrounded, check_close):
    stride, columns = geometry[4], geometry[2]
    wave, weight, scale, bias = _inputs(geometry, kind)
    norm = (torch.randn(columns), torch.randn(columns))
    norm = norm if has_norm else (None, None)
    tail = (1e-5, True, dtype, 40.0, 31, -28)
    expected = wave_conv.reference(
        wave, *WAVE, weight, scale, bias, stride, *norm, *tail
    )
    norm = tuple(map(surrounded, norm)) if has_norm else norm
    found = wave_conv.launch(
        surrounded(wave),
        *WAVE,
        *map(surrounded, (weight, scale, bias)),
        stride,
        *norm,
        *tail,
    )
    check_close(found, expected)


@pytest.mark.parametrize("geometry", GEOMETRIES[1:], ids=str)
def test_group_norm(geometry, surrounded, check_close, device):
    """Two passes give GroupNorm over the real frames."""
    batch, _, columns, _, stride = geometry
    wave, weight, scale, _ = _inputs(geometry)
    gain, shift = torch.randn(columns), torch.randn(columns)
    one = torch.ones(columns)
    plain = wave_conv.reference(
        wave, *WAVE, weight, one, None, stride, None, None, 0.0, False,
        torch.float32,
    )  # fmt: skip
    frames = torch.tensor(plain.shape[1] - 3)
    real = (plain * scale)[:, : int(frames)].transpose(1, 2)
    expected = F.gelu(F.group_norm(real, columns, gain, shift, 1e-5))

    placed, weight = surrounded(wave), surrounded(weight)
    count = frames.to(device)
    sums = wave_conv.launch_sums(placed, *WAVE, weight, stride, count)
    integers = plain[:, : int(frames)].long()
    assert torch.equal(sums[0].cpu(), integers.sum(1))
    assert torch.equal(sums[1].cpu(), (integers * integers).sum(1))

    own = wave_conv.normalized_scale(
        sums, count, *(t.to(device) for t in (scale, gain, shift)), 1e-5
    )
    assert own[0].shape == (batch, columns)
    found = wave_conv.launch(
        placed,
        *WAVE,
        weight,
        *map(surrounded, own),
        stride,
        None,
        None,
        0.0,
        True,
        torch.float32,
    )
    found = found[:, : int(frames)].transpose(1, 2)
    check_close(found.contiguous(), expected, tolerance=1e-4)


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES[1:], ids=str)
def test_group_norm_in_floating_point(
    geometry, kind, surrounded, check_close, device
):
    """Means far from 0 lose nothing: pieces are centred before squares."""
    batch, _, columns, _, stride = geometry
    wave, weight, one, _ = _inputs(geometry, kind)
    wave += 30
    gain, shift = torch.randn(columns), torch.randn(columns)
    tail = (stride, None, None, 0.0, False, torch.float32)
    plain = wave_conv.reference(wave, *WAVE, weight, one, None, *tail)
    frames = torch.tensor(plain.shape[1] - 3)
    real = plain[:, : int(frames)].transpose(1, 2)
    expected = F.gelu(F.group_norm(real, columns, gain, shift, 1e-5))

    placed, weight = surrounded(wave), surrounded(weight)
    count = frames.to(device)
    moments = wave_conv.launch_moments(placed, weight, stride, count)
    target = wave_conv.reference_moments(wave, weight.cpu(), stride, frames)
    check_close(moments, target)
    own = wave_conv.normalized_moments(
        moments, count, gain.to(device), shift.to(device), 1e-5
    )
    assert own[0].shape == (batch, columns)
    tail = (stride, None, None, 0.0, True, torch.float32)
    found = wave_conv.launch(
        placed, *WAVE, weight, *map(surrounded, own), *tail
    )
    found = found[:, : int(frames)].transpose(1, 2)
    check_close(found.contiguous(), expected, tolerance=1e-4)


def test_pieces_without_real_frames_are_zero(surrounded, device):
    wave, weight = torch.randn(1, 2000), torch.randn(16, 10)
    frames = torch.tensor(70, device=device)
    placed = surrounded(wave), surrounded(weight)
    moments = wave_conv.launch_moments(*placed, 5, frames)
    assert moments.shape == (2, 1, 7, 16)
    assert (moments[:, :, :2] != 0).all()
    assert (moments[:, :, 2:] == 0).all()


def test_sums_of_the_worst_case_are_exact(surrounded, device):
    wave = torch.full((1, 5000), 9.0)
    weight = torch.full((16, 10), -127, dtype=torch.int8)
    frames = torch.tensor(900, device=device)
    sums = wave_conv.launch_sums(
        surrounded(wave), *WAVE, surrounded(weight), 5, frames
    )
    total = -127 * 127 * 10
    assert sums[0].unique().tolist() == [900 * total]
    assert sums[1].unique().tolist() == [900 * total**2]
    torch.empty(1)  # this operator allocates none of the guarded outputs


def test_refuses_what_it_cannot_compute(device):
    weight = torch.empty(8, 200, dtype=torch.int8, device=device)
    frames = torch.tensor(1, device=device)
    wave = torch.zeros(1, 9, device=device)
    with pytest.raises(ValueError, match="200 taps, at most 128"):
        wave_conv.launch_sums(wave, *WAVE, weight, 5, frames)
    with pytest.raises(ValueError, match="9 samples are fewer than the ker"):
        wave_conv.launch_sums(wave, *WAVE, weight[:, :10], 5, frames)
    with pytest.raises(TypeError, match="sums: weight must be int8, got"):
        wave_conv.launch_sums(wave, *WAVE, weight[:, :5].half(), 5, frames)
    with pytest.raises(TypeError, match="wave_conv_moments: weight must be"):
        wave_conv.launch_moments(wave, weight[:, :5], 5, frames)
    with pytest.raises(ValueError, match="must be contiguous float32"):
        wave_conv.launch_sums(wave.half(), *WAVE, weight[:, :5], 5, frames)
