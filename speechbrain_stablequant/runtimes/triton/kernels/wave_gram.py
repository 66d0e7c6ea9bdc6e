"""What a GroupNorm after the first convolution needs, without computing it.

The convolution is linear in its windows: over time, the mean of a channel is
its weights times the windows' mean, and its variance is the quadratic form of
its weights with the windows' covariance. So a pass over the waveform adds up
the windows and their products (65 sums for ten taps), `normalized_over_time`
turns these into a scale and a bias for each utterance and channel, and the
convolution itself runs once, with its normalization fused.
"""

import torch
import triton
import triton.language as tl

from .device import round_to_int8
from .library import declare
from .wave import as_input, check_wave

#: Frames of a block: float32 sums of their products of 127 are exact.
BLOCK = 256


def reference(
    wave: torch.Tensor,
    wave_inverse: float,
    wave_limit: int,
    dtype: torch.dtype,
    taps: int,
    stride: int,
    frames: torch.Tensor,
) -> torch.Tensor:
    """Sums over time of the windows of a waveform and of their products.

    Arguments
    ---------
    wave : torch.Tensor
        float32 [batch, samples], contiguous.
    wave_inverse : float
        1 / scale of the quantized waveform; read if ``dtype`` is int8.
    wave_limit : int
        Its largest integer.
    dtype : torch.dtype
        int8, or the float dtype that the waveform takes before anything.
    taps, stride : int
        Length of a window, and samples from one to the next.
    frames : torch.Tensor
        int64 scalar: only so many windows are real.

    Returns
    -------
    torch.Tensor
        float64 [batch, taps + 1, taps]: the products, then the sums.

    Example
    -------
    >>> wave = torch.tensor([[1.0, 2.0, 3.0]])
    >>> one = torch.tensor(1)
    >>> reference(wave, 1.0, 127, torch.int8, 2, 1, one)
    tensor([[[1., 2.],
             [2., 4.],
             [1., 2.]]], dtype=torch.float64)
    """
    check_wave("wave_gram", wave, taps, stride)
    x = as_input(wave, wave_inverse, wave_limit, dtype)
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
    """Scale and bias that normalize the convolution over time.

    The convolution's own bias cancels. All of it is in float64, so that the
    covariance loses nothing where a channel takes away what is strong.

    Arguments
    ---------
    gram : torch.Tensor
        float64 [batch, taps + 1, taps], of :func:`reference`.
    frames : torch.Tensor
        int64 scalar, as there.
    kernel : torch.Tensor
        int8 or float [out, taps]: the convolution's weight.
    scale : torch.Tensor
        float32 [out]: what its sums are multiplied by.
    weight, bias : torch.Tensor
        float32 [out] of the GroupNorm.
    eps : float
        Of the GroupNorm.

    Returns
    -------
    tuple of torch.Tensor
        float32 [batch, out], both: for the convolution's sums.

    Example
    -------
    >>> gram = torch.tensor([[[10.0], [4.0]]]).double()  # of 1 and 3
    >>> two, one, zero = torch.full((1, 1), 2.0), torch.ones(1), torch.zeros(1)
    >>> normalized_over_time(gram, torch.tensor(2), two, one, one, zero, 0.0)
    (tensor([[0.5000]]), tensor([[-2.]]))
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
    wave,
    grams,
    real_frames,
    frames,
    samples,
    inverse,
    limit,
    KIND: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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


#: Of the convolution's weights -> what Triton calls it.
_KINDS = {
    torch.int8: tl.int8,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


def launch(
    wave, wave_inverse, wave_limit, dtype, taps, stride, frames
) -> torch.Tensor:
    """:func:`reference` in Triton."""
    count = check_wave("wave_gram", wave, taps, stride)
    if dtype not in _KINDS:
        raise TypeError(
            f"stablequant::wave_gram: dtype must be one of "
            f"{', '.join(map(str, _KINDS))}, got {dtype}"
        )
    batch, samples = wave.shape
    pieces = triton.cdiv(count, BLOCK)
    grams = torch.empty(
        (batch, pieces, taps + 1, taps),
        dtype=torch.float64,
        device=wave.device,
    )
    wave_gram_kernel[(pieces, batch, taps)](
        wave,
        grams,
        frames,
        count,
        samples,
        wave_inverse,
        float(wave_limit),
        KIND=_KINDS[dtype],
        TAPS=taps,
        STRIDE=stride,
        BLOCK=BLOCK,
        num_warps=1,
    )
    return grams.sum(1)


def shape(wave, wave_inverse, wave_limit, dtype, taps, stride, frames):
    """An empty result."""
    return wave.new_empty((wave.shape[0], taps + 1, taps), dtype=torch.float64)


declare(
    "wave_gram",
    "(Tensor wave, float wave_inverse, int wave_limit, ScalarType dtype, "
    "int taps, int stride, Tensor frames) -> Tensor",
    reference,
    launch,
    shape,
)
