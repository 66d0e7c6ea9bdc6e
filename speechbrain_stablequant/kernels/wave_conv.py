"""The first convolution: from the waveform, which it quantizes on the way.

One input channel, so the reduction is a single step. A LayerNorm over the
channels is fused. A GroupNorm over time (base models) needs two passes, and
since ten products are cheaper than a tensor of float32 the convolution is
computed twice: `wave_conv_sums` adds up the int32 results and their squares
exactly, `normalized_scale` turns these into a scale and a bias for each
utterance and channel, and `wave_conv` applies them.

With weights in floating point the waveform takes their dtype instead of being
quantized. There are no exact sums then: `wave_conv_moments` gives mean and
squares of short pieces, which `normalized_moments` puts together.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .device import (
    affine_columns,
    gelu_erf,
    halves,
    round_to_int8,
    scale_and_bias,
    standardize_rows,
    store_tile,
)
from .library import check_int8, declare
from .matmul import MAX_NORM_CHANNELS, frames_out
from .plain import finish, scaled
from .tuning import Config, rank, select, shape_bucket

#: Taps that fit into one step.
MAX_TAPS = 128
#: Frames of a piece that `wave_conv_moments` looks at.
PIECE = 64

#: (block_m, block_n, warps) where a tile need not hold whole rows.
TILES = ((128, 128, 8), (64, 128, 4), (64, 64, 4))
#: (block_m, warps) where it must.
ROW_TILES = ((64, 8), (32, 8), (16, 4))


def _sums(wave, wave_inverse, wave_limit, weight, stride):
    """Sums in float64 [batch, frames, out]: those of integers are exact."""
    if weight.dtype == torch.int8:
        x = torch.round(wave * wave_inverse).clamp_(-wave_limit, wave_limit)
    else:
        x = wave.to(weight.dtype)
    return x.unfold(1, weight.shape[1], stride).double() @ weight.double().T


def reference(
    wave: torch.Tensor,
    wave_inverse: float,
    wave_limit: int,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    gelu: bool,
    dtype: torch.dtype,
    inverse: float = 1.0,
    limit: int = 127,
    zero: int = 0,
) -> torch.Tensor:
    """Quantize, convolve, scale, add the bias, LayerNorm, GELU, quantize.

    Arguments
    ---------
    wave : torch.Tensor
        float32 [batch, samples], contiguous.
    wave_inverse : float
        1 / scale of the quantized waveform; read with int8 weights only.
    wave_limit : int
        Its largest integer.
    weight : torch.Tensor
        int8 [out, kernel]; or float, which takes the waveform as it is.
    scale : torch.Tensor
        float32 [out], or [batch, out]: scale of the input times scale of the
        weight.
    bias : torch.Tensor or None
        float32, the shape of ``scale``.
    stride : int
        Of the convolution; it has no padding.
    norm_weight, norm_bias : torch.Tensor or None
        float32 [out] of a LayerNorm over the channels; both or none.
    eps : float
        Of the LayerNorm.
    gelu : bool
        Whether GELU is applied.
    dtype : torch.dtype
        Of the result; int8 means that it is quantized.
    inverse : float
        1 / scale of the quantized result.
    limit : int
        Its largest integer.
    zero : int
        The integer that a result of 0 becomes.

    Returns
    -------
    torch.Tensor
        [batch, frames, out].
    """
    _check_weight("wave_conv", weight)
    total = _sums(wave, wave_inverse, wave_limit, weight, stride)
    if scale.dim() == 2:
        scale = scale[:, None]
        bias = None if bias is None else bias[:, None]
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps)
    y = scaled(total, scale, bias)
    return finish(y, gelu, dtype, inverse, limit, norm, zero=zero)


def reference_sums(
    wave: torch.Tensor,
    wave_inverse: float,
    wave_limit: int,
    weight: torch.Tensor,
    stride: int,
    frames: torch.Tensor,
) -> torch.Tensor:
    """Sums over time of the integer convolution and of its squares, exact.

    Arguments
    ---------
    wave, wave_inverse, wave_limit, weight, stride
        As in :func:`reference`.
    frames : torch.Tensor
        int64 scalar: only so many frames are real.

    Returns
    -------
    torch.Tensor
        int64 [2, batch, out].
    """
    check_int8("wave_conv_sums", weight=weight)
    total = _sums(wave, wave_inverse, wave_limit, weight, stride).long()
    real = torch.arange(total.shape[1], device=wave.device) < frames
    total = total * real[None, :, None]
    return torch.stack([total.sum(1), (total * total).sum(1)])


def reference_moments(
    wave: torch.Tensor, weight: torch.Tensor, stride: int, frames: torch.Tensor
) -> torch.Tensor:
    """Moments over time of the convolution, for pieces of ``PIECE`` frames.

    Arguments
    ---------
    wave, weight, stride
        As in :func:`reference`; the weight is float.
    frames : torch.Tensor
        int64 scalar: only so many frames are real.

    Returns
    -------
    torch.Tensor
        float32 [2, batch, pieces, out]: mean of the real frames, and the sum
        of their squared distances from it; 0 where none is real.
    """
    total = _sums(wave, 1.0, 0, weight, stride)
    total = F.pad(total, (0, 0, 0, -total.shape[1] % PIECE))
    real = torch.arange(total.shape[1], device=wave.device) < frames
    parts = total.unflatten(1, (-1, PIECE))
    real = real.view(-1, PIECE, 1)
    count = real.sum(1).clamp(min=1)
    mean = (parts * real).sum(2) / count
    square = ((parts - mean[:, :, None]) * real).square().sum(2)
    return torch.stack([mean, square]).float()


def normalized_moments(
    moments: torch.Tensor,
    frames: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and bias that normalise the convolution over time.

    Arguments
    ---------
    moments : torch.Tensor
        float32 [2, batch, pieces, out], of :func:`reference_moments`.
    frames : torch.Tensor
        int64 scalar, as there.
    weight, bias : torch.Tensor
        float32 [out] of the GroupNorm.
    eps : float
        Of the GroupNorm.

    Returns
    -------
    tuple of torch.Tensor
        float32 [batch, out], both.

    Example
    -------
    >>> moments = torch.tensor([[[[2.0]]], [[[8.0]]]])  # of 0 and 4
    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> normalized_moments(moments, torch.tensor(2), one, zero, 0.0)
    (tensor([[0.5000]]), tensor([[-1.]]))
    """
    mean, square = moments.double().unbind(0)
    start = torch.arange(mean.shape[1], device=mean.device) * PIECE
    count = (frames - start).clamp(0, PIECE)[:, None]
    whole = (mean * count).sum(1, keepdim=True) / frames
    spread = square + count * (mean - whole).square()
    factor = torch.rsqrt(spread.sum(1) / frames + eps) * weight
    return factor.float(), (bias - whole[:, 0] * factor).float()


def normalized_scale(
    sums: torch.Tensor,
    frames: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and bias that normalise the convolution's integers over time.

    The convolution's own bias cancels. The variance is taken in float64 from
    exact sums, so nothing is lost by subtracting.

    Arguments
    ---------
    sums : torch.Tensor
        int64 [2, batch, out], of :func:`reference_sums`.
    frames : torch.Tensor
        int64 scalar, as there.
    scale : torch.Tensor
        float32 [out], as in :func:`reference`.
    weight, bias : torch.Tensor
        float32 [out] of the GroupNorm.
    eps : float
        Of the GroupNorm.

    Returns
    -------
    tuple of torch.Tensor
        float32 [batch, out], both.

    Example
    -------
    >>> sums = torch.tensor([[[4]], [[20]]])  # of the integers 0, 4, 0, 0 ...
    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> normalized_scale(sums, torch.tensor(2), one, one, zero, 0.0)
    (tensor([[0.4082]]), tensor([[-0.8165]]))
    """
    mean, square = (sums.double() / frames).unbind(0)
    wide = scale.double()
    variance = (square - mean * mean) * wide * wide
    factor = wide * torch.rsqrt(variance + eps) * weight
    return factor.float(), (bias - mean * factor).float()


@triton.jit
def _product(
    wave,
    weight,
    start,
    column,
    wave_inverse,
    wave_limit,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of the windows that begin at ``start``: int32, or float32."""
    tap = tl.arange(0, BLOCK_K)
    here = tap[None, :] < TAPS
    x = tl.load(wave + start[:, None] + tap[None, :], mask=here, other=0.0)
    n = tl.minimum(column, COLUMNS - 1)
    w = weight + n[:, None] * TAPS + tap[None, :]
    if weight.dtype.element_ty == tl.int8:
        q = round_to_int8(x, wave_inverse, wave_limit, 0.0)
        w = tl.load(w, mask=here, other=0)
        return tl.dot(q, w.T, out_dtype=tl.int32)
    else:
        w = tl.load(w, mask=here, other=0.0)
        # float32 is for comparisons, not for speed
        return tl.dot(x.to(w.dtype), w.T, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "frames", "samples"])
def wave_conv_kernel(
    wave,
    weight,
    out,
    scale,
    bias,
    norm_weight,
    norm_bias,
    rows,
    frames,
    samples,
    wave_inverse,
    wave_limit,
    eps,
    inverse,
    limit,
    zero,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    BY_UTTERANCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Axis 2 is the utterance where the scale is its own, else rows run on.
    utterance = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.minimum(row, rows - 1)
    start = (utterance + m // frames) * samples + m % frames * STRIDE
    acc = _product(
        wave,
        weight,
        start,
        column,
        wave_inverse,
        wave_limit,
        COLUMNS,
        TAPS,
        BLOCK_K,
    )
    base = 0
    if BY_UTTERANCE:
        base = utterance * COLUMNS
    if NORM:
        inside = column < COLUMNS
        y = scale_and_bias(acc, scale, bias, base + column, inside, HAS_BIAS)
        y = standardize_rows(y, COLUMNS, inside[None, :], eps)
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


@triton.jit(do_not_specialize=["frames", "samples", "batch"])
def wave_sums_kernel(
    wave,
    weight,
    sums,
    real_frames,
    frames,
    samples,
    batch,
    wave_inverse,
    wave_limit,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    utterance = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.minimum(row, frames - 1)
    acc = _product(
        wave,
        weight,
        utterance * samples + m * STRIDE,
        column,
        wave_inverse,
        wave_limit,
        COLUMNS,
        TAPS,
        BLOCK_K,
    )
    real = (row < tl.load(real_frames)) & (row < frames)
    wide = tl.where(real[:, None], acc, 0).to(tl.int64)
    inside = column < COLUMNS
    place = sums + utterance * COLUMNS + column
    # Integers: the order of the additions does not change the sums.
    tl.atomic_add(place, tl.sum(wide, axis=0), mask=inside, sem="relaxed")
    place += batch * COLUMNS
    square = tl.sum(wide * wide, axis=0)
    tl.atomic_add(place, square, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["frames", "samples", "batch"])
def wave_moments_kernel(
    wave,
    weight,
    moments,
    real_frames,
    frames,
    samples,
    batch,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    utterance = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.minimum(row, frames - 1)
    y = _product(
        wave,
        weight,
        utterance * samples + m * STRIDE,
        column,
        1.0,
        0.0,
        COLUMNS,
        TAPS,
        BLOCK_K,
    )
    end = tl.minimum(tl.load(real_frames).to(tl.int32), frames)
    real = (row < end)[:, None]
    count = tl.maximum(tl.minimum(end - first, BLOCK_M), 1)
    mean = tl.sum(tl.where(real, y, 0.0), axis=0) / count
    y = tl.where(real, y - mean[None, :], 0.0)
    place = utterance * tl.num_programs(0) + tl.program_id(0)
    place = place * COLUMNS + column
    inside = column < COLUMNS
    tl.store(moments + place, mean, mask=inside)
    place += batch * tl.num_programs(0) * COLUMNS
    tl.store(moments + place, tl.sum(y * y, axis=0), mask=inside)


def _check_weight(name: str, weight: torch.Tensor) -> None:
    if not weight.dtype.is_floating_point:
        check_int8(name, weight=weight)


def _check(name, wave, weight, stride):
    _check_weight(name, weight)
    taps = weight.shape[1]
    if taps > MAX_TAPS:
        raise ValueError(
            f"stablequant::{name}: a kernel of {taps} taps, at most "
            f"{MAX_TAPS} are supported"
        )
    if wave.dtype != torch.float32 or not wave.is_contiguous():
        raise ValueError(
            f"stablequant::{name}: wave must be contiguous float32, got "
            f"{wave.dtype} with strides {list(wave.stride())}"
        )
    frames = frames_out(wave.shape[1], taps, stride)
    if frames == 0:
        raise ValueError(
            f"stablequant::{name}: {wave.shape[1]} samples are fewer than "
            f"the kernel's {taps}"
        )
    return frames, max(triton.next_power_of_2(taps), 32)


def launch(
    wave,
    wave_inverse,
    wave_limit,
    weight,
    scale,
    bias,
    stride,
    norm_weight,
    norm_bias,
    eps,
    gelu,
    dtype,
    inverse=1.0,
    limit=127,
    zero=0,
    config: Config | None = None,
) -> torch.Tensor:
    """:func:`reference` in Triton. ``config`` overrides the tile."""
    frames, block_k = _check("wave_conv", wave, weight, stride)
    kind = str(weight.dtype).removeprefix("torch.")
    columns, taps = weight.shape
    batch, samples = wave.shape
    has_norm = norm_weight is not None
    if has_norm and columns > MAX_NORM_CHANNELS:
        raise ValueError(
            f"stablequant::wave_conv: a LayerNorm over {columns} channels "
            f"cannot be fused, at most {MAX_NORM_CHANNELS}; call layer_norm "
            "after it"
        )
    out = torch.empty((batch, frames, columns), dtype=dtype, device=wave.device)
    by_utterance = scale.dim() == 2
    rows = frames if by_utterance else batch * frames
    width = max(triton.next_power_of_2(columns), 32)
    tiles = (
        [Config(m, width, block_k, w, 1) for m, w in ROW_TILES]
        if has_norm
        else [Config(m, n, block_k, w, 1) for m, n, w in TILES]
    )

    def run(tile: Config) -> None:
        grid = (
            triton.cdiv(rows, tile.block_m),
            triton.cdiv(columns, tile.block_n),
            batch if by_utterance else 1,
        )
        # An argument that is not there is never read: any pointer will do.
        wave_conv_kernel[grid](
            wave,
            weight,
            out,
            scale,
            scale if bias is None else bias,
            norm_weight if has_norm else scale,
            norm_bias if has_norm else scale,
            rows,
            frames,
            samples,
            wave_inverse,
            float(wave_limit),
            eps,
            inverse,
            float(limit),
            float(zero),
            COLUMNS=columns,
            TAPS=taps,
            STRIDE=stride,
            BY_UTTERANCE=by_utterance,
            HAS_BIAS=bias is not None,
            NORM=has_norm,
            GELU=gelu,
            QUANTIZE=dtype == torch.int8,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    if config is None:
        config = select(
            f"wave_conv/{kind}/{shape_bucket(batch * frames)}x{columns}x{taps}"
            f"/{int(has_norm)}{int(gelu)}{int(by_utterance)}"
            f"/{str(dtype).removeprefix('torch.')}",
            rank(tiles, batch * frames, columns, wave.device),
            run,
            lambda: out,
        )
    run(config)
    return out


def launch_sums(
    wave, wave_inverse, wave_limit, weight, stride, frames
) -> torch.Tensor:
    """:func:`reference_sums` in Triton."""
    check_int8("wave_conv_sums", weight=weight)
    count, block_k = _check("wave_conv_sums", wave, weight, stride)
    columns, taps = weight.shape
    batch, samples = wave.shape
    sums = torch.zeros(
        (2, batch, columns), dtype=torch.int64, device=wave.device
    )
    grid = (triton.cdiv(count, 64), triton.cdiv(columns, 64), batch)
    wave_sums_kernel[grid](
        wave,
        weight,
        sums,
        frames,
        count,
        samples,
        batch,
        wave_inverse,
        float(wave_limit),
        COLUMNS=columns,
        TAPS=taps,
        STRIDE=stride,
        BLOCK_M=64,
        BLOCK_N=64,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=1,
    )
    return sums


def launch_moments(wave, weight, stride, frames) -> torch.Tensor:
    """:func:`reference_moments` in Triton."""
    if not weight.dtype.is_floating_point:
        raise TypeError(
            "stablequant::wave_conv_moments: weight must be floating point, "
            f"got {weight.dtype}"
        )
    count, block_k = _check("wave_conv_moments", wave, weight, stride)
    columns, taps = weight.shape
    batch, samples = wave.shape
    pieces = triton.cdiv(count, PIECE)
    moments = torch.empty(
        (2, batch, pieces, columns), dtype=torch.float32, device=wave.device
    )
    wave_moments_kernel[(pieces, triton.cdiv(columns, 64), batch)](
        wave,
        weight,
        moments,
        frames,
        count,
        samples,
        batch,
        COLUMNS=columns,
        TAPS=taps,
        STRIDE=stride,
        BLOCK_M=PIECE,
        BLOCK_N=64,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=1,
    )
    return moments


def shape(
    wave,
    wave_inverse,
    wave_limit,
    weight,
    scale,
    bias,
    stride,
    norm_weight,
    norm_bias,
    eps,
    gelu,
    dtype,
    inverse=1.0,
    limit=127,
    zero=0,
):
    """An empty result."""
    frames = (wave.shape[1] - weight.shape[1]) // stride + 1
    return wave.new_empty((wave.shape[0], frames, weight.shape[0]), dtype=dtype)


def shape_sums(wave, wave_inverse, wave_limit, weight, stride, frames):
    """An empty result."""
    return wave.new_empty(
        (2, wave.shape[0], weight.shape[0]), dtype=torch.int64
    )


def shape_moments(wave, weight, stride, frames):
    """An empty result."""
    count = (wave.shape[1] - weight.shape[1]) // stride + 1
    pieces = (count + PIECE - 1) // PIECE
    return wave.new_empty((2, wave.shape[0], pieces, weight.shape[0]))


declare(
    "wave_conv",
    "(Tensor wave, float wave_inverse, int wave_limit, Tensor weight, "
    "Tensor scale, Tensor? bias, int stride, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, bool gelu, ScalarType dtype, "
    "float inverse=1.0, int limit=127, int zero=0) -> Tensor",
    reference,
    launch,
    shape,
)
declare(
    "wave_conv_sums",
    "(Tensor wave, float wave_inverse, int wave_limit, Tensor weight, "
    "int stride, Tensor frames) -> Tensor",
    reference_sums,
    launch_sums,
    shape_sums,
)
declare(
    "wave_conv_moments",
    "(Tensor wave, Tensor weight, int stride, Tensor frames) -> Tensor",
    reference_moments,
    launch_moments,
    shape_moments,
)
