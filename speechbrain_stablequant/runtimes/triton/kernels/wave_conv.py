"""The first convolution, which also quantizes the waveform.

With one input channel the reduction is a single step. A LayerNorm over the
channels is fused, and so is a GroupNorm over time (base models), as a scale and
a bias for each utterance and channel. These are computed before: one pass over
the waveform sums its windows and their products (65 sums for ten taps), from
which a channel's mean and variance follow, see ``runtimes.group_norm``.
With floating-point weights the waveform is cast to their dtype instead of being
quantized.
"""

import torch
import triton
import triton.language as tl

from .architectures import Card, card_of
from .device import (
    affine_columns,
    gelu_erf,
    halves,
    round_to_int8,
    scale_and_bias,
    standardize_rows,
    store_tile,
)
from .library import check_contiguous, check_dtype, declare, output_frames
from .plain import finish, scaled
from .tiles import FUSED, Config, generate, rank, shape_bucket
from .tuning import compared, select, tuning_key

#: Largest kernel size that is supported.
MAX_TAPS = 128
#: Frames of a block of sums: so many products of int8 are exact in float32.
SUMMED_FRAMES = 256


def wave_frames(
    operator: str, wave: torch.Tensor, taps: int, stride: int
) -> int:
    """Number of output frames; raises for an input that has no kernel."""
    check_dtype(operator, torch.float32, wave=wave)
    check_contiguous(operator, "wave", wave)
    return output_frames(operator, wave.shape[1], taps, stride)


def wave_input(
    wave: torch.Tensor, inverse: float, limit: int, dtype: torch.dtype
) -> torch.Tensor:
    """The waveform as input for weights of ``dtype``: integers, or a cast."""
    if dtype == torch.int8:
        return torch.round(wave * inverse).clamp_(-limit, limit)
    return wave.to(dtype)


def reference(
    wave: torch.Tensor, wave_inverse: float, wave_limit: int,
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
    stride: int, norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None, eps: float, gelu: bool, dtype: torch.dtype,
    inverse: float = 1.0, limit: int = 127, zero: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Convolution without padding, LayerNorm, GELU: float32 ``wave`` [batch,
    samples], contiguous, to [batch, frames, out].

    ``weight`` is [out, kernel]: int8, for which the waveform is quantized with
    ``wave_inverse`` and ``wave_limit``, or float. ``scale`` and ``bias`` are
    float32 [out], or [batch, out].
    """
    wave_frames("wave_conv", wave, weight.shape[1], stride)
    x = wave_input(wave, wave_inverse, wave_limit, weight.dtype)
    # sums of integers are exact in float64
    total = x.unfold(1, weight.shape[1], stride).double() @ weight.double().T
    if scale.dim() == 2:
        scale = scale[:, None]
        bias = None if bias is None else bias[:, None]
    y = scaled(total, scale, bias)
    norm = (norm_weight, norm_bias, eps)
    return finish(y, gelu, dtype, inverse, limit, zero, norm)


@triton.jit(do_not_specialize=["rows", "frames", "samples"])
def wave_conv_kernel(
    wave, weight, out, scale, bias, norm_weight, norm_bias, rows, frames,
    samples, wave_inverse, wave_limit, eps, inverse, limit, zero,
    COLUMNS: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr,
    BY_UTTERANCE: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr,
    GELU: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Axis 2 is the utterance where the scale is its own, else rows run on.
    utterance = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.minimum(row, rows - 1)
    start = (utterance + m // frames) * samples + m % frames * STRIDE
    tap = tl.arange(0, BLOCK_K)
    here = tap[None, :] < TAPS
    x = tl.load(wave + start[:, None] + tap[None, :], mask=here, other=0.0)
    n = tl.minimum(column, COLUMNS - 1)
    w = weight + n[:, None] * TAPS + tap[None, :]
    if weight.dtype.element_ty == tl.int8:
        q = round_to_int8(x, wave_inverse, wave_limit, 0.0)
        w = tl.load(w, mask=here, other=0)
        acc = tl.dot(q, w.T, out_dtype=tl.int32)
    else:
        w = tl.load(w, mask=here, other=0.0)
        # float32 is for comparisons, not for speed
        acc = tl.dot(x.to(w.dtype), w.T, input_precision="ieee")
    base = 0
    if BY_UTTERANCE:
        base = utterance * COLUMNS
    if NORM:
        inside = column < COLUMNS
        y = scale_and_bias(acc, scale, bias, base + column, inside, HAS_BIAS)
        y = standardize_rows(y, inside[None, :], eps, COLUMNS)
        parts = halves(y, BLOCK_M, BLOCK_N)
    else:
        parts = halves(acc, BLOCK_M, BLOCK_N)
    wide = (utterance * frames + row)[:, None]
    for half in tl.static_range(2):
        column = tl.program_id(1) * BLOCK_N + half * (BLOCK_N // 2)
        column += tl.arange(0, BLOCK_N // 2)
        inside = column < COLUMNS
        if NORM:
            y = affine_columns(
                parts[half], norm_weight, norm_bias, column, inside
            )
        else:
            y = scale_and_bias(
                parts[half], scale, bias, base + column, inside, HAS_BIAS
            )
        if GELU:
            y = gelu_erf(y)
        mask = (row[:, None] < rows) & inside[None, :]
        offsets = wide * COLUMNS + column[None, :]
        store_tile(out, offsets, y, inverse, limit, zero, mask, QUANTIZE)


def _tiles(
    weight: torch.Tensor, has_norm: bool, card: Card
) -> tuple[Config, ...]:
    """Tiles of one step, with a norm such that hold whole rows."""
    columns, taps = weight.shape
    steps = (max(triton.next_power_of_2(taps), 32),)
    if not has_norm:
        return generate(card, (128, 64), (128, 64), steps, _one_step, 64)
    width = (max(triton.next_power_of_2(columns), 32),)
    # float32 is for comparisons only; larger tiles take too many registers
    wide = weight.dtype == torch.float32
    rows = (16,) if wide else (card.architecture.norm_rows, 32, 16)
    return generate(card, tuple(dict.fromkeys(rows)), width, steps, _one_step)


def _one_step(tile: Config, card: Card) -> int:
    """Shared memory of operands of at most 32 bit; nothing is in flight."""
    return 4 * (tile.block_m + tile.block_n) * tile.block_k


def launch(
    wave, wave_inverse, wave_limit, weight, scale, bias, stride,
    norm_weight, norm_bias, eps, gelu, dtype,
    inverse=1.0, limit=127, zero=0, config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """`reference` in Triton. ``config`` overrides the tile."""
    columns, taps = weight.shape
    frames = wave_frames("wave_conv", wave, taps, stride)
    batch, samples = wave.shape
    out = torch.empty((batch, frames, columns), dtype=dtype, device=wave.device)
    has_norm, by_utterance = norm_weight is not None, scale.dim() == 2
    rows = frames if by_utterance else batch * frames

    def run(tile: Config) -> None:
        grid = (
            triton.cdiv(rows, tile.block_m),
            triton.cdiv(columns, tile.block_n),
            batch if by_utterance else 1,
        )
        # A pointer whose constexpr flag is off is never read: any will do.
        wave_conv_kernel[grid](
            wave, weight, out,
            scale, scale if bias is None else bias,
            norm_weight if has_norm else scale,
            norm_bias if has_norm else scale,
            rows, frames, samples, wave_inverse, float(wave_limit),
            eps, inverse, float(limit), float(zero),
            COLUMNS=columns, TAPS=taps, STRIDE=stride,
            BY_UTTERANCE=by_utterance, HAS_BIAS=bias is not None,
            NORM=has_norm, GELU=gelu, QUANTIZE=dtype == torch.int8,
            **tile.options(),
        )  # fmt: skip

    key = tuning_key(
        f"wave_conv/{weight.dtype}",
        (shape_bucket(batch * frames), columns, taps),
        (has_norm, gelu, by_utterance), dtype,
    )  # fmt: skip
    card = card_of(wave.device)
    tiles = rank(_tiles(weight, has_norm, card), batch * frames, columns, card)

    def expected(entries: torch.Tensor) -> torch.Tensor:
        own = [
            x[entries] if by_utterance and x is not None else x
            for x in (scale, bias)
        ]
        return reference(
            wave[entries], wave_inverse, wave_limit, weight, *own, stride,
            norm_weight, norm_bias, eps, gelu, dtype, inverse, limit, zero,
        )  # fmt: skip

    run(config or select(key, tiles, run, compared(out, expected)))
    return out


declare("wave_conv", reference, launch)


def gram_reference(
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
    gram: torch.Tensor, frames: torch.Tensor, kernel: torch.Tensor,
    scale: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
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


def launch_gram(
    wave, wave_inverse, wave_limit, dtype, taps, stride, frames
) -> torch.Tensor:
    """`gram_reference` in Triton."""
    count = wave_frames("wave_gram", wave, taps, stride)
    batch, samples = wave.shape
    pieces = triton.cdiv(count, SUMMED_FRAMES)
    shape = (batch, pieces, taps + 1, taps)
    grams = torch.empty(shape, dtype=torch.float64, device=wave.device)
    kind = getattr(tl, str(dtype).removeprefix("torch."))
    wave_gram_kernel[(pieces, batch, taps)](
        wave, grams, frames, count, samples, wave_inverse, float(wave_limit),
        KIND=kind, TAPS=taps, STRIDE=stride, BLOCK=SUMMED_FRAMES,
        num_warps=1, **FUSED,
    )  # fmt: skip
    return grams.sum(1)


declare("wave_gram", gram_reference, launch_gram)
