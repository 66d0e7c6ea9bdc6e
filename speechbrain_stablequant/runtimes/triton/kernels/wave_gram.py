"""Statistics for a GroupNorm after the first convolution, before it runs.

One pass over the waveform sums its windows and their products (65 sums for ten
taps); a channel's mean and variance over time follow from them, see
``runtimes.group_norm``. So the convolution runs once with its norm fused.
"""

import torch
import triton
import triton.language as tl

from .device import round_to_int8
from .library import declare
from .wave_conv import wave_frames, wave_input

#: Frames of a block: float32 sums of so many products of int8 are exact.
BLOCK = 256


def reference(
    wave: torch.Tensor, wave_inverse: float, wave_limit: int,
    dtype: torch.dtype, taps: int, stride: int, frames: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Sums over time of a waveform's windows, and of their products.

    float32 ``wave`` [batch, samples] to float64 [batch, taps + 1, taps]:
    products, then sums, of the first ``frames`` (int64 scalar) windows. The
    waveform is quantized first if ``dtype`` is int8, else cast to it.
    """
    wave_frames("wave_gram", wave, taps, stride)
    x = wave_input(wave, wave_inverse, wave_limit, dtype)
    windows = x.unfold(1, taps, stride).double()
    real = torch.arange(windows.shape[1], device=wave.device) < frames
    windows = windows * real[None, :, None]
    products = windows.transpose(1, 2) @ windows
    return torch.cat([products, windows.sum(1, keepdim=True)], dim=1)


def normalized_over_time(
    gram: torch.Tensor,
    frames: torch.Tensor,
    kernel: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and bias, float32 [batch, out], that fuse GroupNorm into the
    convolution with weight ``kernel`` [out, taps] and ``scale`` [out]; its own
    bias cancels. ``weight`` and ``bias`` are the norm's. float64, because the
    covariance loses precision where a channel removes most of the signal.
    """
    gram, kernel = gram / frames, kernel.double()
    products, mean = gram[:, :-1], gram[:, -1:]
    covariance = products - mean.transpose(1, 2) * mean
    variance = ((kernel @ covariance) * kernel).sum(-1)
    wide = scale.double()
    factor = wide * torch.rsqrt(variance * wide * wide + eps) * weight
    shift = bias - (mean @ kernel.T)[:, 0] * factor
    return factor.float(), shift.float()


@triton.jit
def _entry(place, real, inverse, limit, dtype: tl.constexpr):
    """One sample of each window, as the convolution takes it, to be summed."""
    x = tl.load(place, mask=real, other=0.0)
    if dtype == tl.int8:
        return round_to_int8(x, inverse, limit, 0.0).to(tl.float32)
    else:
        return x.to(dtype).to(tl.float64)


@triton.jit(do_not_specialize=["frames", "samples"])
def wave_gram_kernel(
    wave, grams, real_frames, frames, samples, inverse, limit,
    KIND: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    utterance = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum(tl.load(real_frames).to(tl.int32), frames)
    real = row < end
    start = wave + utterance * samples + row * STRIDE
    piece = utterance * tl.num_programs(0) + tl.program_id(0)
    place = grams + piece * (TAPS + 1) * TAPS
    i = tl.program_id(2)
    a = _entry(start + i, real, inverse, limit, KIND)
    tl.store(place + TAPS * TAPS + i, tl.sum(a, axis=0).to(tl.float64))
    for j in range(i, TAPS):
        b = _entry(start + j, real, inverse, limit, KIND)
        total = tl.sum(a * b, axis=0).to(tl.float64)
        tl.store(place + i * TAPS + j, total)
        tl.store(place + j * TAPS + i, total)


def launch(
    wave, wave_inverse, wave_limit, dtype, taps, stride, frames
) -> torch.Tensor:
    """`reference` in Triton."""
    count = wave_frames("wave_gram", wave, taps, stride)
    batch, samples = wave.shape
    pieces = triton.cdiv(count, BLOCK)
    shape = (batch, pieces, taps + 1, taps)
    grams = torch.empty(shape, dtype=torch.float64, device=wave.device)
    kind = getattr(tl, str(dtype).removeprefix("torch."))
    wave_gram_kernel[(pieces, batch, taps)](
        wave, grams, frames, count, samples, wave_inverse, float(wave_limit),
        KIND=kind, TAPS=taps, STRIDE=stride, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip
    return grams.sum(1)


declare("wave_gram", reference, launch)
