"""The first convolution, and the GroupNorm over time behind it, which is made
of sums of windows."""

import pytest
import torch
from torch.nn import functional as F

from speechbrain_stablequant.runtimes.triton.kernels import wave_conv

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

#: batch, samples, out, kernel, stride
GEOMETRIES = [
    (1, 10, 8, 10, 5),
    (2, 333, 24, 10, 5),
    (3, 170, 48, 3, 2),
    (1, 700, 17, 40, 20),
]
#: The same; more than one block of sums.
LONGER = [
    (1, 10, 8, 10, 5),
    (2, 333, 24, 10, 5),
    (3, 1170, 48, 3, 2),
    (1, 700, 17, 24, 20),
]
WAVE = (float(1.0 / torch.tensor(3.0 / 127)), 127)
KINDS = [torch.int8, torch.float16, torch.float32]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    ("has_norm", "dtype"), [(True, torch.int8), (False, torch.float16)]
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_convolution(geometry, has_norm, dtype, kind, equals_reference):
    batch, samples, columns, kernel, stride = geometry
    wave = torch.randn(batch, samples)
    if kind == torch.int8:
        weight = torch.randint(-127, 128, (columns, kernel), dtype=kind)
        scale = torch.rand(columns) * 1e-3
    else:
        weight = torch.randn(columns, kernel).to(kind)
        scale = torch.ones(columns)
    bias = torch.randn(columns)
    norm = (None, None)
    if has_norm:
        norm = (torch.randn(columns), torch.randn(columns))
    equals_reference(
        "wave_conv", wave, *WAVE, weight, scale, bias, stride, *norm, 1e-5,
        True, dtype, 40.0, 31, -28,
    )  # fmt: skip


def test_refuses_what_it_cannot_compute(device):
    weight = torch.empty(8, 10, dtype=torch.int8, device=device)
    wave, one = torch.zeros(1, 9, device=device), torch.ones(8, device=device)
    tail = (one, None, 5, None, None, 0.0, False, torch.float16)
    with pytest.raises(ValueError, match="9 frames are fewer than the ker"):
        wave_conv.launch(wave, *WAVE, weight, *tail)
    with pytest.raises(TypeError, match="wave must be float32, got"):
        wave_conv.launch(wave.half(), *WAVE, weight[:, :5], *tail)
    with pytest.raises(ValueError, match="wave must be contiguous"):
        wave_conv.launch(wave[:, ::2], *WAVE, weight[:, :5], *tail)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("geometry", LONGER, ids=str)
def test_sums(geometry, kind, surrounded, device):
    batch, samples, _, taps, stride = geometry
    wave = torch.randn(batch, samples) + 3
    frames = torch.tensor(max(samples // stride - taps, 1))
    window = (*WAVE, kind, taps, stride)
    expected = wave_conv.gram_reference(wave, *window, frames)
    found = wave_conv.launch_gram(surrounded(wave), *window, frames.to(device))
    assert found.dtype == torch.float64
    # float64 of integers is exact, of others but for the order of the sums
    rtol = 0 if kind == torch.int8 else 1e-13
    torch.testing.assert_close(found.cpu(), expected, rtol=rtol, atol=0)


def test_sums_of_the_worst_case_are_exact(surrounded, device):
    wave, frames = torch.full((1, 8000), 9.0), torch.tensor(1300)
    window = (*WAVE, torch.int8, 10, 5, frames.to(device))
    found = wave_conv.launch_gram(surrounded(wave), *window).cpu()
    assert found[:, :10].unique().tolist() == [1300 * 127 * 127]
    assert found[:, 10].unique().tolist() == [1300 * 127]


@pytest.mark.parametrize("loud", [0.0, 300.0])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("geometry", LONGER[1:], ids=str)
def test_group_norm(geometry, kind, loud, surrounded, check_close, device):
    """Scale and bias give GroupNorm over the real frames, also where a
    channel takes away nearly all of a waveform."""
    batch, samples, columns, taps, stride = geometry
    wave = torch.randn(batch, samples)
    weight = torch.randn(columns, taps)
    if loud:
        wave += loud
        weight -= weight.mean(1, keepdim=True)
    scale = torch.ones(columns)
    if kind == torch.int8:
        weight = torch.randint(-127, 128, (columns, taps))
        scale = torch.rand(columns) * 1e-3
    weight = weight.to(kind)
    quantized = (WAVE[0] / (1 + loud), 127)
    gain, shift = torch.randn(columns), torch.randn(columns)
    tail = (stride, None, None, 0.0, False, torch.float32)
    x = wave_conv.wave_input(wave, *quantized, kind)
    sums = x.unfold(1, taps, stride).double() @ weight.double().T
    frames = torch.tensor(sums.shape[1] - 3)
    real = (sums * scale)[:, : int(frames)].transpose(1, 2)
    expected = F.group_norm(real, columns, gain.double(), shift.double(), 1e-5)

    placed = surrounded(wave)
    count, taken = frames.to(device), surrounded(weight)
    gram = wave_conv.launch_gram(placed, *quantized, kind, taps, stride, count)
    own = wave_conv.normalized_over_time(
        gram, count, taken, *map(surrounded, (scale, gain, shift)), 1e-5
    )
    assert own[0].shape == (batch, columns)
    # what the gram says, by itself
    exact = sums[:, : int(frames)] * own[0].cpu()[:, None].double()
    exact = (exact + own[1].cpu()[:, None]).transpose(1, 2)
    close = 1e-6 * (1 + loud)
    torch.testing.assert_close(exact, expected, rtol=close, atol=close)
    # and with the kernel that applies it
    found = wave_conv.launch(
        placed, *quantized, taken, *map(surrounded, own), *tail
    )
    found = found[:, : int(frames)].transpose(1, 2)
    tolerance = 1e-4 * (1 + loud)
    check_close(found.contiguous(), expected.float(), tolerance=tolerance)


def test_refuses_sums_that_it_cannot_compute(device):
    frames = torch.tensor(1, device=device)
    wave = torch.zeros(1, 9, device=device)
    with pytest.raises(ValueError, match="9 frames are fewer than the ker"):
        wave_conv.launch_gram(wave, *WAVE, torch.int8, 10, 5, frames)
    with pytest.raises(TypeError, match="wave must be float32, got"):
        wave_conv.launch_gram(wave.half(), *WAVE, torch.int8, 5, 5, frames)
    with pytest.raises(ValueError, match="wave must be contiguous"):
        wave_conv.launch_gram(wave[:, ::2], *WAVE, torch.int8, 5, 5, frames)
    torch.empty(1)  # nothing is allocated before a refusal
