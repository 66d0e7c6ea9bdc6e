"""The positional convolution: grouped, 128 taps, with GELU and residual.

Each group is an implicit product over (tap, channel). The padding is a mask of
the loads, and windows are never written to memory.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .architectures import card_of
from .device import (
    add_products,
    empty_sums,
    gelu_erf,
    scale_and_bias,
    store_tile,
)
from .library import check_contiguous, check_dtype, declare, output_frames
from .plain import finish, scaled
from .tiles import Config, generate, rank, shape_bucket
from .tuning import compared, select, tuning_key


def pack_weight(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """int8 [out, in / groups, taps] to [groups, out / groups, taps, width].

    A group's channels are padded with zeros to a power of two of at least 32,
    so that a step of the reduction holds whole taps.
    """
    out, channels, taps = weight.shape
    width = max(triton.next_power_of_2(channels), 32)
    shape = (groups, out // groups, taps, channels)
    packed = weight.transpose(1, 2).reshape(shape)
    return F.pad(packed, (0, width - channels)).contiguous()


def _checked_frames(
    q: torch.Tensor, weight: torch.Tensor, padding: int, trim: int
) -> int:
    """Number of output frames; raises for an input that has no kernel."""
    check_dtype("group_conv1d", torch.int8, q=q, weight=weight)
    check_contiguous("group_conv1d", "q", q)
    padded = q.shape[1] + 2 * padding - trim
    return output_frames("group_conv1d", padded, weight.shape[2], 1)


def reference(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, residual: torch.Tensor | None, padding: int,
    trim: int, gelu: bool, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Grouped convolution of stride 1, GELU, then ``residual``: int8 ``q``
    [batch, time, in], contiguous, and ``weight`` from `pack_weight` to float
    [batch, frames, out]. Drops the last ``trim`` frames."""
    frames = _checked_frames(q, weight, padding, trim)
    groups, out, taps, _ = weight.shape
    channels = q.shape[2] // groups
    kernel = weight[..., :channels].reshape(groups * out, taps, channels)
    total = F.conv1d(
        q.transpose(1, 2).double(),
        kernel.transpose(1, 2).double(),
        padding=padding,
        groups=groups,
    )
    total = total[:, :, :frames].transpose(1, 2).round().contiguous()
    y = scaled(total, scale, bias)
    return finish(y, gelu, dtype, residual=residual)


@triton.jit(do_not_specialize=["rows", "frames", "frames_in"])
def group_conv_kernel(
    x, weight, out, scale, bias, residual, rows, frames, frames_in,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, TAPS: tl.constexpr, PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # COLUMNS and CHANNELS are those of one group.
    step: tl.constexpr = BLOCK_K // WIDTH
    across: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(1) // across
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    channel = depth % WIDTH
    m = tl.minimum(row, rows - 1)
    utterance = (m // frames).to(tl.int64)
    n = tl.minimum(column, COLUMNS - 1)
    # The input frame under each (row, tap of the first step).
    under = (m % frames - PADDING)[:, None] + (depth // WIDTH)[None, :]
    x_tile = (
        x
        + (utterance * frames_in)[:, None] * (GROUPS * CHANNELS)
        + under * (GROUPS * CHANNELS)
        + (group * CHANNELS + channel)[None, :]
    )
    w_tile = (
        weight
        + (group * COLUMNS + n)[:, None] * (TAPS * WIDTH)
        + depth[None, :]
    )
    acc = empty_sums(BLOCK_M, BLOCK_N, WIDE)
    for tap in range(0, TAPS, step):
        here = (under >= 0) & (under < frames_in)
        if CHANNELS != WIDTH:
            here = here & (channel < CHANNELS)[None, :]
        a = tl.load(x_tile, mask=here, other=0)
        if TAPS % step == 0:
            b = tl.load(w_tile)
        else:
            # Taps beyond the last have no weight; they must count as zero.
            left = (depth // WIDTH)[None, :] < TAPS - tap
            b = tl.load(w_tile, mask=left, other=0)
        acc = add_products(acc, a, b, WIDE)
        under += step
        x_tile += step * GROUPS * CHANNELS
        w_tile += BLOCK_K

    inside = column < COLUMNS
    place = group * COLUMNS + column
    y = scale_and_bias(acc, scale, bias, place, inside, HAS_BIAS)
    if GELU:
        y = gelu_erf(y)
    mask = (row[:, None] < rows) & inside[None, :]
    offsets = row.to(tl.int64)[:, None] * (GROUPS * COLUMNS) + place[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    store_tile(out, offsets, y, 1.0, 127.0, 0.0, mask, QUANTIZE=False)


def launch(
    q, weight, scale, bias, residual, padding, trim, gelu, dtype,
    config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """`reference` in Triton. ``config`` overrides the tile; its ``block_k`` is
    a multiple of the weight's width."""
    frames = _checked_frames(q, weight, padding, trim)
    groups, columns, taps, width = weight.shape
    batch, frames_in, channels = q.shape
    out_shape = (batch, frames, groups * columns)
    if residual is not None:
        check_contiguous("group_conv1d", "residual", residual, out_shape)
    out = torch.empty(out_shape, dtype=dtype, device=q.device)
    rows = batch * frames
    block_n = min(max(triton.next_power_of_2(columns), 16), 128)
    steps = tuple(dict.fromkeys(max(k, width) for k in (128, 64, 256)))
    card = card_of(q.device)
    tiles = generate(card, (128, 64), (block_n,), steps)

    def run(tile: Config) -> None:
        grid = (
            triton.cdiv(rows, tile.block_m),
            groups * triton.cdiv(columns, tile.block_n),
        )
        group_conv_kernel[grid](
            q, weight, out,
            scale, scale if bias is None else bias,
            out if residual is None else residual,
            rows, frames, frames_in,
            GROUPS=groups, CHANNELS=channels // groups, WIDTH=width,
            COLUMNS=columns, TAPS=taps, PADDING=padding,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            GELU=gelu, WIDE=not card.architecture.int8_pays, **tile.options(),
        )  # fmt: skip

    key = tuning_key(
        "group_conv1d", (shape_bucket(rows), groups, columns, taps, width),
        (gelu, residual is not None), dtype,
    )  # fmt: skip
    ranked = rank(tiles, rows, groups * columns, card)

    def expected(entries: torch.Tensor) -> torch.Tensor:
        old = None if residual is None else residual[entries]
        return reference(
            q[entries], weight, scale, bias, old, padding, trim, gelu, dtype
        )

    run(config or select(key, ranked, run, compared(out, expected)))
    return out


declare("group_conv1d", reference, launch)
