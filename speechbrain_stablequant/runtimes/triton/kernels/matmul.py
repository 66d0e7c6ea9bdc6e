"""int8 products: a linear layer, and a strided convolution, on one kernel.

With channels innermost, the window of a convolution is contiguous: row t of
the implicit matrix starts ``stride`` frames after row t - 1 and is
``kernel * channels`` long. The convolution is a product with overlapping rows.

The epilogue scales the int32 sums, adds the bias, normalizes each row if the
tile holds whole rows, applies GELU, adds the residual, and stores 16 bit or
quantizes, so no intermediate result goes through memory.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .architectures import Card, card_of
from .device import (
    add_products,
    affine_columns,
    empty_sums,
    gelu_erf,
    halves,
    scale_and_bias,
    standardize_rows,
    store_tile,
)
from .library import (
    check_contiguous,
    check_dtype,
    check_rows,
    declare,
    output_frames,
)
from .plain import finish, scaled
from .tiles import Config, generate, rank, shape_bucket
from .tuning import MEASURED, Check, compared, select, tuning_key

try:
    from . import hopper
except (ImportError, AttributeError):  # Triton without Gluon, or another one
    hopper = None

#: Widest row that one tile holds.
MAX_NORM_CHANNELS = 512


class Rows(NamedTuple):
    """Left factor: row m starts at element
    ``(m // period) * outer + (m % period) * inner`` of ``x``; without a period
    at ``m * inner``."""

    x: torch.Tensor
    inner: int
    period: int | None = None
    outer: int = 0


@triton.jit
def _tile(
    tile, x, weight, out, scale, bias, residual, rows, period, x_outer, x_inner,
    residual_stride, inverse, limit, zero, norm_weight, norm_bias, eps,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    GELU: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of the result."""
    # In groups of GROUP rows: neighbors share operands in the cache.
    down = tl.cdiv(rows, BLOCK_M)
    across = tl.cdiv(COLUMNS, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    pid_m = first + tile % (GROUP * across) % height
    pid_n = tile % (GROUP * across) // height

    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end repeat the last one: loads need no mask.
    m = tl.minimum(row, rows - 1)
    n = tl.minimum(column, COLUMNS - 1)
    if OVERLAP:
        start = (m // period).to(tl.int64) * x_outer
        start += (m % period).to(tl.int64) * x_inner
    else:
        start = m.to(tl.int64) * x_inner
    x_tile = x + start[:, None] + depth[None, :]
    w_tile = weight + n[:, None] * DEPTH + depth[None, :]
    acc = empty_sums(BLOCK_M, BLOCK_N, WIDE)
    for k in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            left = depth[None, :] < DEPTH - k
            a = tl.load(x_tile, mask=left, other=0)
            b = tl.load(w_tile, mask=left, other=0)
        acc = add_products(acc, a, b, WIDE)
        x_tile += BLOCK_K
        w_tile += BLOCK_K

    if NORM:
        inside = column < COLUMNS
        y = scale_and_bias(acc, scale, bias, column, inside, HAS_BIAS)
        y = standardize_rows(y, inside[None, :], eps, COLUMNS)
        parts = halves(y, BLOCK_M, BLOCK_N)
    else:
        parts = halves(acc, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        column = pid_n * BLOCK_N + half * (BLOCK_N // 2)
        column += tl.arange(0, BLOCK_N // 2)
        inside = column < COLUMNS
        if NORM:
            y = affine_columns(
                parts[half], norm_weight, norm_bias, column, inside
            )
        else:
            y = scale_and_bias(
                parts[half], scale, bias, column, inside, HAS_BIAS
            )
        if GELU:
            y = gelu_erf(y)
        mask = (row[:, None] < rows) & inside[None, :]
        wide = row.to(tl.int64)[:, None]
        if HAS_RESIDUAL:
            old = residual + wide * residual_stride + column[None, :]
            y += tl.load(old, mask=mask, other=0.0).to(tl.float32)
        offsets = wide * COLUMNS + column[None, :]
        store_tile(out, offsets, y, inverse, limit, zero, mask, QUANTIZE)


# Sizes that change from input to input must not ask for a compilation.
@triton.jit(do_not_specialize=["rows", "period"])
def matmul_kernel(
    x, weight, out, scale, bias, residual, rows, period, x_outer, x_inner,
    residual_stride, inverse, limit, zero, norm_weight, norm_bias, eps,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    GELU: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        # Every so many tiles. Both loops become one, so that the first steps
        # of the next tile are loaded while the end of this one is computed.
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(COLUMNS, BLOCK_N)
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=True
        ):
            _tile(
                tile, x, weight, out, scale, bias, residual, rows, period,
                x_outer, x_inner, residual_stride, inverse, limit, zero,
                norm_weight, norm_bias, eps, COLUMNS, DEPTH, OVERLAP, HAS_BIAS,
                HAS_RESIDUAL, NORM, GELU, QUANTIZE, BLOCK_M, BLOCK_N, BLOCK_K,
                GROUP, WIDE,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x, weight, out, scale, bias, residual, rows,
            period, x_outer, x_inner, residual_stride, inverse, limit, zero,
            norm_weight, norm_bias, eps, COLUMNS, DEPTH, OVERLAP, HAS_BIAS,
            HAS_RESIDUAL, NORM, GELU, QUANTIZE, BLOCK_M, BLOCK_N, BLOCK_K,
            GROUP, WIDE,
        )  # fmt: skip


def _tiles(
    columns: int, depth: int, norm: bool, card: Card
) -> tuple[Config, ...]:
    """Tiles of a product; with a norm, such that hold whole rows."""
    if norm:
        width = (max(triton.next_power_of_2(columns), 32),)
        found = generate(card, (32,), width, (64, 128), sums=64)
        if card.architecture.norm_rows == 64 and not card.races:
            found = generate(card, (64,), width, (64, 128)) + found
        return found
    rows = (64, 32) if card.races else (128, 64)
    for steps in ((128, 256), (128,), (64,)):
        if depth % steps[-1] == 0:
            # integers as float16 take more registers
            sums = 128 if card.architecture.int8_pays else 64
            return generate(card, rows, (256, 128, 64), steps, sums=sums)
    # the masks of a depth that no step divides take registers
    return generate(card, (64, 32), (64, 32), (64,))


def _candidates(
    rows: int, columns: int, depth: int, norm: bool, residual: bool, card: Card
) -> list[Config]:
    """Tiles for a product, best guess first."""
    found = []
    if hopper is not None and not norm:
        product = (rows, columns, card)
        ranked = rank(hopper.tiles(card, depth, residual), *product)
        outlines = list(dict.fromkeys(tile.outline for tile in ranked))
        # half of what is measured
        few = outlines[: MEASURED // 2]
        found = [tile for tile in ranked if tile.outline in few]
    for tile in rank(_tiles(columns, depth, norm, card), rows, columns, card):
        found.append(tile)
        # others would spill registers
        lasting = tile.block_k == 64 if norm else tile.block_k == 128
        lasting &= tile.block_m >= 64 and (tile.block_n < 256 or not residual)
        # the same candidates for all row counts that share a tuning key
        blocks = _blocks(tile, shape_bucket(rows), columns)
        # if all blocks run at once, none has a second tile to go on to
        if lasting and blocks > _at_once(tile, card):
            found.append(replace(tile, persistent=True))
    return found


def _blocks(tile: Config, rows: int, columns: int) -> int:
    """Tiles of a result."""
    across = triton.cdiv(columns, tile.block_n)
    return triton.cdiv(rows, tile.block_m) * across


def _at_once(tile: Config, card: Card) -> int:
    """Number of blocks that run concurrently: a multiprocessor has registers
    for the sums of eight warps, and shared memory for some tiles."""
    fit = card.shared_bytes // tile.shared_bytes(card)
    return card.processors * max(min(8 // tile.num_warps, fit), 1)


def _launch(
    name: str, left: Rows, weight: torch.Tensor, out: torch.Tensor,
    scale: torch.Tensor, bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor | None, torch.Tensor | None, float], gelu: bool,
    form: tuple[float, int, int], config: Config | None, check: Check,
) -> None:  # fmt: skip
    """Fills ``out`` [rows, columns]; ``form`` is inverse scale, largest
    integer and zero point of an int8 result."""
    rows, columns = out.shape
    depth, card = weight.shape[1], card_of(out.device)
    inverse, limit, zero = form
    norm_weight, norm_bias, eps = norm
    has_norm, has_residual = norm_weight is not None, residual is not None

    def run(tile: Config) -> None:
        blocks = _blocks(tile, rows, columns)
        if tile.persistent:
            blocks = min(blocks, _at_once(tile, card))
        if tile.gluon:
            kernel, own = hopper.hopper_kernel, {"STAGES": tile.num_stages}
        else:
            kernel, own = matmul_kernel, {
                "norm_weight": norm_weight if has_norm else scale,
                "norm_bias": norm_bias if has_norm else scale,
                "eps": eps if has_norm else 0.0, "NORM": has_norm,
                "WIDE": not card.architecture.int8_pays,
                "PERSISTENT": tile.persistent,
            }  # fmt: skip
        # A pointer whose constexpr flag is off is never read: any will do.
        kernel[(blocks,)](
            left.x, weight, out,
            scale, scale if bias is None else bias,
            residual if has_residual else out,
            rows, left.period or rows, left.outer, left.inner,
            residual.stride(0) if has_residual else 0,
            inverse, float(limit), float(zero),
            COLUMNS=columns, DEPTH=depth, OVERLAP=left.period is not None,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=has_residual, GELU=gelu,
            QUANTIZE=out.dtype == torch.int8, GROUP=8, **own, **tile.options(),
        )  # fmt: skip

    switches = (has_norm, gelu, has_residual)
    sizes = (shape_bucket(rows), columns, depth)
    key = tuning_key(name, sizes, switches, out.dtype)
    tiles = _candidates(rows, columns, depth, has_norm, has_residual, card)
    run(config or select(key, tiles, run, check))


def linear_reference(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, residual: torch.Tensor | None, gelu: bool,
    dtype: torch.dtype, inverse: float = 1.0, limit: int = 127, zero: int = 0,
) -> torch.Tensor:  # fmt: skip
    """``gelu(q @ weight.T * scale + bias) + residual``: int8 ``q`` [..., in]
    and ``weight`` [out, in] to [..., out]."""
    check_dtype("linear", torch.int8, q=q, weight=weight)
    # float64 holds every such sum exactly and is fast on CPU
    y = scaled(q.double() @ weight.double().T, scale, bias)
    return finish(y, gelu, dtype, inverse, limit, zero, residual=residual)


def launch_linear(
    q, weight, scale, bias, residual, gelu, dtype,
    inverse=1.0, limit=127, zero=0, config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """`linear_reference` in Triton; rows of ``q`` and ``residual`` may be
    strided. ``config`` overrides the tile."""
    check_dtype("linear", torch.int8, q=q, weight=weight)
    rows = check_rows("linear", q)
    columns = weight.shape[0]
    out = torch.empty((*q.shape[:-1], columns), dtype=dtype, device=q.device)

    def expected(entries: torch.Tensor) -> torch.Tensor:
        old = None if residual is None else residual[entries]
        return linear_reference(
            q[entries], weight, scale, bias, old, gelu, dtype, inverse, limit,
            zero,
        )  # fmt: skip

    _launch(
        "linear", Rows(rows, rows.stride(0)), weight,
        out.view(-1, columns), scale, bias,
        None if residual is None else check_rows("linear", residual),
        (None, None, 0.0), gelu, (inverse, limit, zero), config,
        compared(out, expected),
    )  # fmt: skip
    return out


declare("linear", linear_reference, launch_linear)


def pack_conv_weight(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, kernel] to [out, kernel * in], the layout of the product."""
    return weight.transpose(1, 2).reshape(weight.shape[0], -1).contiguous()


def _checked_frames(
    q: torch.Tensor, weight: torch.Tensor, kernel: int, stride: int
) -> int:
    """Number of output frames; raises for an input that has no kernel."""
    check_dtype("conv1d", torch.int8, q=q, weight=weight)
    check_contiguous("conv1d", "q", q)
    return output_frames("conv1d", q.shape[1], kernel, stride)


def conv_reference(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, kernel: int, stride: int,
    norm_weight: torch.Tensor | None, norm_bias: torch.Tensor | None,
    eps: float, gelu: bool, dtype: torch.dtype, inverse: float = 1.0,
    limit: int = 127, zero: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Convolution without padding, LayerNorm, GELU: int8 ``q`` [batch, time,
    in], contiguous, and ``weight`` from `pack_conv_weight` to [batch, frames,
    out]."""
    frames = _checked_frames(q, weight, kernel, stride)
    batch, _, channels = q.shape
    windows = q.as_strided(
        (batch, frames, kernel * channels), (q.stride(0), stride * channels, 1)
    )
    y = scaled(windows.double() @ weight.double().T, scale, bias)
    norm = (norm_weight, norm_bias, eps)
    return finish(y, gelu, dtype, inverse, limit, zero, norm)


def launch_conv(
    q, weight, scale, bias, kernel, stride, norm_weight, norm_bias, eps,
    gelu, dtype, inverse=1.0, limit=127, zero=0,
    config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """`conv_reference` in Triton. ``config`` overrides the tile; with a norm
    its ``block_n`` must hold all channels."""
    frames = _checked_frames(q, weight, kernel, stride)
    columns = weight.shape[0]
    out_shape = (q.shape[0], frames, columns)
    out = torch.empty(out_shape, dtype=dtype, device=q.device)

    def expected(entries: torch.Tensor) -> torch.Tensor:
        return conv_reference(
            q[entries], weight, scale, bias, kernel, stride, norm_weight,
            norm_bias, eps, gelu, dtype, inverse, limit, zero,
        )  # fmt: skip

    _launch(
        "conv1d", Rows(q, stride * q.shape[2], frames, q.stride(0)), weight,
        out.view(-1, columns), scale, bias, None,
        (norm_weight, norm_bias, eps), gelu, (inverse, limit, zero), config,
        compared(out, expected),
    )  # fmt: skip
    return out


declare("conv1d", conv_reference, launch_conv)
