"""Attention over the real frames of each utterance, to int8 if asked.

Lengths come as numbers, not as a mask: padding is not computed, so that an
utterance costs hardly more when it is padded to a bucket. Scores stay in
registers, and the integer input of the output projection is written directly.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .architectures import Card, card_of
from .device import store_tile
from .library import check_contiguous, declare
from .plain import HALF_TOLERANCE, finish
from .tiles import FUSED, Config, generate, shape_bucket
from .tuning import compared, select, tuning_key

#: Widest head.
MAX_HEAD = 256
_LOG2_E = 1.4426950408889634


def _check(qkv: torch.Tensor, heads: int) -> int:
    """Channels of a head; raises for an input that has no kernel."""
    check_contiguous("attention", "qkv", qkv)
    size, rest = divmod(qkv.shape[2], 3 * heads)
    if rest or not 1 <= size <= MAX_HEAD:
        raise ValueError(
            f"stablequant::attention: {qkv.shape[2]} columns are not those of "
            f"query, key and value with {heads} heads of at most {MAX_HEAD}"
        )
    return size


def reference(
    qkv: torch.Tensor, heads: int, real: torch.Tensor, dtype: torch.dtype,
    inverse: float = 1.0, limit: int = 127, zero: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Scaled dot-product attention of each head to [batch, time, channels].

    ``qkv`` [batch, time, 3 * channels] holds query, key and value, each with
    its heads side by side. Only the first ``real`` (int64 [batch], at least 1)
    keys are attended to. Frames that are not real hold anything finite.
    """
    _check(qkv, heads)
    batch, frames, columns = qkv.shape
    parts = qkv.float().view(batch, frames, 3, heads, -1)
    parts = parts.permute(2, 0, 3, 1, 4)
    mask = torch.arange(frames, device=qkv.device) < real[:, None]
    y = F.scaled_dot_product_attention(*parts.unbind(0), mask[:, None, None, :])
    y = y.transpose(1, 2).reshape(batch, frames, columns // 3)
    return finish(y, False, dtype, inverse, limit, zero)


@triton.jit
def _attend(
    acc, total, largest, q, keys, values, start, count, stride, scale, inside,
    FULL: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one step of keys and values to the sums of a tile of queries."""
    column = start + tl.arange(0, BLOCK_N)
    offsets = tl.minimum(column, count - 1)[:, None] * stride
    if WHOLE:
        k = tl.load(keys + offsets)
        v = tl.load(values + offsets)
    else:
        k = tl.load(keys + offsets, mask=inside, other=0.0)
        v = tl.load(values + offsets, mask=inside, other=0.0)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    if not FULL:
        s = tl.where((column < count)[None, :], s, float("-inf"))
    # the scale is positive: that of the largest score is the largest, and
    # the others are scaled and subtracted from in one instruction
    new = tl.maximum(largest, tl.max(s, axis=1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    shrink = tl.exp2(largest - new)
    total = total * shrink + tl.sum(p, axis=1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new


@triton.jit(do_not_specialize=["frames"])
def attention_kernel(
    qkv, out, real, frames, scale, inverse, limit, zero,
    HEADS: tl.constexpr, SIZE: tl.constexpr, QUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    utterance = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    stride: tl.constexpr = 3 * HEADS * SIZE
    whole: tl.constexpr = SIZE == WIDTH
    channel = tl.arange(0, WIDTH)
    inside = (channel < SIZE)[None, :]
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    base = qkv + utterance * frames * stride + head * SIZE + channel[None, :]
    count = tl.minimum(tl.load(real + utterance).to(tl.int32), frames)
    # Queries that are all padding attend to nothing and give zeros.
    end = tl.where(tl.program_id(0) * BLOCK_M < count, count, 0)

    q_offsets = tl.minimum(row, frames - 1)[:, None] * stride
    if whole:
        q = tl.load(base + q_offsets)
    else:
        q = tl.load(base + q_offsets, mask=inside, other=0.0)
    keys = base + HEADS * SIZE
    values = base + 2 * HEADS * SIZE
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    full = end // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        acc, total, largest = _attend(
            acc, total, largest, q, keys, values, start, count, stride, scale,
            inside, True, whole, BLOCK_N, PRECISION,
        )  # fmt: skip
    if full < end:
        acc, total, largest = _attend(
            acc, total, largest, q, keys, values, full, count, stride, scale,
            inside, False, whole, BLOCK_N, PRECISION,
        )  # fmt: skip
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    mask = (row < frames)[:, None] & inside
    offsets = (utterance * frames + row)[:, None] * (HEADS * SIZE)
    offsets += head * SIZE + channel[None, :]
    store_tile(out, offsets, y, inverse, limit, zero, mask, QUANTIZE)


def _half_bytes(tile: Config, card: Card) -> int:
    """Shared memory of queries, keys and values in 16 bit."""
    loaded = 2 * card.buffers(tile.num_stages) * tile.block_n
    return (tile.block_m + loaded) * tile.block_k * 2


def _float_bytes(tile: Config, card: Card) -> int:
    return 2 * _half_bytes(tile, card)


def _candidates(
    frames: int, instances: int, width: int, item: int, card: Card
) -> list[Config]:
    """Tiles that fit, the fastest by estimate first; ``item`` is the number of
    bytes of a value."""

    def cycles(tile: Config) -> float:
        blocks = triton.cdiv(frames, tile.block_m) * instances
        # each tile loads its own queries and all the keys
        return triton.cdiv(blocks, card.processors) * (tile.block_m + 32)

    if item == 4:
        # float32 is for comparisons only and does not use the tensor cores:
        # larger tiles do not fit into the registers
        return list(generate(card, (32,), (32,), (width,), _float_bytes, 32))
    sizes, sums = (128, 64, 32), 32 if card.races else 64
    tiles = generate(card, sizes, sizes, (width,), _half_bytes, sums)
    return sorted(tiles, key=cycles)


def launch(
    qkv, heads, real, dtype, inverse=1.0, limit=127, zero=0,
    config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """`reference` in Triton. ``config`` overrides the tile; its ``block_k`` is
    the width of a head, rounded up to a power of two."""
    size = _check(qkv, heads)
    batch, frames, _ = qkv.shape
    out_shape = (batch, frames, heads * size)
    out = torch.empty(out_shape, dtype=dtype, device=qkv.device)
    width = max(triton.next_power_of_2(size), 16)

    def run(tile: Config) -> None:
        grid = (triton.cdiv(frames, tile.block_m), batch * heads)
        attention_kernel[grid](
            qkv, out, real, frames,
            size**-0.5 * _LOG2_E, inverse, float(limit), float(zero),
            HEADS=heads, SIZE=size, QUANTIZE=dtype == torch.int8,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WIDTH=width,
            # float32 is for comparisons, not for speed
            PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
            num_warps=tile.num_warps, num_stages=tile.num_stages, **FUSED,
        )  # fmt: skip

    sizes = (batch * heads, shape_bucket(frames), size)
    key = tuning_key("attention", sizes, (), qkv.dtype, dtype)
    tiles = _candidates(
        frames, batch * heads, width, qkv.element_size(),
        card_of(qkv.device),
    )  # fmt: skip

    def expected(entries: torch.Tensor) -> torch.Tensor:
        return reference(
            qkv[entries], heads, real[entries], dtype, inverse, limit, zero
        )

    def certain(x: torch.Tensor) -> torch.Tensor:
        # values behind the real frames depend on the tile
        return x[:, : int(real.min())]

    check = compared(out, expected, HALF_TOLERANCE, certain)
    run(config or select(key, tiles, run, check))
    return out


declare("attention", reference, launch)
