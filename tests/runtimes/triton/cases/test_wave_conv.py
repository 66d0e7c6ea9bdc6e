"""The first convolution."""

import pytest
import torch

from speechbrain_stablequant.runtimes.triton.kernels import wave_conv

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

#: batch, samples, out, kernel, stride
GEOMETRIES = [
    (1, 10, 8, 10, 5),
    (2, 333, 24, 10, 5),
    (3, 170, 48, 3, 2),
    (1, 700, 17, 40, 20),
]
WAVE = (float(1.0 / torch.tensor(3.0 / 127)), 127)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
@pytest.mark.parametrize(
    "kind", [torch.int8, torch.float16, torch.float32], ids=str
)
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
