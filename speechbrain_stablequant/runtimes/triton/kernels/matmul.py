"""int8 products with fused ends: linear layers and strided convolutions.

One kernel computes both. With channels innermost, the window of a
convolution is contiguous: row t of the implicit matrix starts ``stride``
frames after row t - 1 and is ``kernel * channels`` long. So a convolution is
a product whose rows overlap, and a linear layer one whose rows do not.

The end of the kernel scales the int32 sums, adds the bias, normalizes each
row if the tile holds whole rows, applies GELU, adds the residual, and stores
16 bit or quantizes: nothing between two products is written to memory twice.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .device import (
    affine_columns,
    gelu_erf,
    halves,
    scale_and_bias,
    standardize_rows,
    store_tile,
)
from .library import check_int8, check_rows, declare
from .plain import finish, scaled
from .tuning import Config, device_limits, rank, select, shape_bucket

#: Candidates; of two that the rule cannot tell apart, the better one first.
#: The compiler waits for each step's product before it goes on (Triton 3.6
#: overlaps products with float sums only), so two blocks should share a
#: multiprocessor or a step should be long.
TILES = (
    Config(128, 256, 128, 8, 3),
    Config(128, 128, 128, 8, 3),
    Config(128, 128, 128, 4, 3),
    Config(128, 128, 64, 8, 4),
    Config(64, 256, 128, 4, 2),
    Config(128, 64, 128, 4, 4),
    Config(64, 128, 128, 4, 3),
    Config(64, 64, 256, 4, 3),
    Config(64, 64, 128, 4, 4),
    Config(64, 32, 256, 4, 3),
)
#: Where no step divides the depth, masks take registers.
RAGGED_TILES = (Config(64, 64, 64, 4, 3), Config(64, 32, 64, 4, 3))
#: (block_m, block_k, warps, stages) where one tile holds whole rows.
ROW_TILES = (
    (64, 128, 8, 2),
    (64, 64, 8, 3),
    (64, 64, 8, 2),
    (32, 128, 8, 2),
    (32, 64, 8, 2),
)
#: Those that are tried with blocks that go on to another tile as well: with
#: the others, and with the first one and a residual, registers spill.
PERSISTENT = {TILES[0], TILES[1], TILES[2]}
PERSISTENT_ROWS = {(64, 64, 8, 3)}
#: Widest row that one tile holds.
MAX_NORM_CHANNELS = 512


def reference_linear(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    inverse: float = 1.0,
    limit: int = 127,
    zero: int = 0,
) -> torch.Tensor:
    """A linear layer on integers.

    Arguments
    ---------
    q : torch.Tensor
        int8 [..., in].
    weight : torch.Tensor
        int8 [out, in].
    scale : torch.Tensor
        float32 [out]: scale of the input times scale of the weight.
    bias : torch.Tensor or None
        float32 [out].
    residual : torch.Tensor or None
        float [..., out], added last.
    gelu : bool
        Whether GELU is applied, before the residual.
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
        [..., out].

    Example
    -------
    >>> q = torch.tensor([[2, 3]], dtype=torch.int8)
    >>> weight = torch.tensor([[1, 1], [5, -5]], dtype=torch.int8)
    >>> reference_linear(
    ...     q, weight, torch.tensor([1.0, 0.5]), None, None, False,
    ...     torch.float32)
    tensor([[ 5.0000, -2.5000]])
    """
    check_int8("linear", q=q, weight=weight)
    # float64 holds every such sum exactly and has fast products
    y = scaled(q.double() @ weight.double().T, scale, bias)
    return finish(y, gelu, dtype, inverse, limit, None, residual, zero)


def frames_out(frames: int, kernel: int, stride: int) -> int:
    """Frames that a convolution without padding makes.

    Example
    -------
    >>> frames_out(10, 3, 2)
    4
    """
    return max((frames - kernel) // stride + 1, 0)


def _check_conv(name: str, q: torch.Tensor, kernel: int, stride: int) -> int:
    if q.dim() != 3 or not q.is_contiguous():
        raise ValueError(
            f"stablequant::{name}: q must be contiguous [batch, time, "
            f"channels], got {list(q.shape)} with strides {list(q.stride())}"
        )
    frames = frames_out(q.shape[1], kernel, stride)
    if frames == 0:
        raise ValueError(
            f"stablequant::{name}: {q.shape[1]} frames are fewer than the "
            f"kernel's {kernel}"
        )
    return frames


def reference_conv1d(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: int,
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
    """A convolution on integers: scale, bias, LayerNorm, GELU, quantize.

    Arguments
    ---------
    q : torch.Tensor
        int8 [batch, time, in], contiguous.
    weight : torch.Tensor
        int8 [out, kernel * in], the tap outermost: see `pack_conv_weight`.
    scale : torch.Tensor
        float32 [out]: scale of the input times scale of the weight.
    bias : torch.Tensor or None
        float32 [out].
    kernel, stride : int
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
    check_int8("conv1d", q=q, weight=weight)
    frames = _check_conv("conv1d", q, kernel, stride)
    batch, _, channels = q.shape
    windows = q.as_strided(
        (batch, frames, kernel * channels),
        (q.stride(0), stride * channels, 1),
    )
    y = scaled(windows.double() @ weight.double().T, scale, bias)
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps)
    return finish(y, gelu, dtype, inverse, limit, norm, zero=zero)


def pack_conv_weight(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, kernel] as the product wants it: [out, kernel * in].

    Example
    -------
    >>> pack_conv_weight(torch.tensor([[[1, 2, 3], [4, 5, 6]]]))
    tensor([[1, 4, 2, 5, 3, 6]])
    """
    return weight.transpose(1, 2).reshape(weight.shape[0], -1).contiguous()


@triton.jit
def _tile(
    tile,
    x,
    weight,
    out,
    scale,
    bias,
    residual,
    norm_weight,
    norm_bias,
    rows,
    period,
    x_outer,
    x_inner,
    residual_stride,
    eps,
    inverse,
    limit,
    zero,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
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
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            left = depth[None, :] < DEPTH - k
            a = tl.load(x_tile, mask=left, other=0)
            b = tl.load(w_tile, mask=left, other=0)
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
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
    x,
    weight,
    out,
    scale,
    bias,
    residual,
    norm_weight,
    norm_bias,
    rows,
    period,
    x_outer,
    x_inner,
    residual_stride,
    eps,
    inverse,
    limit,
    zero,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    if PERSISTENT:
        # Every so many tiles. Both loops become one, so that the first steps
        # of the next tile are loaded while the end of this one is computed.
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(COLUMNS, BLOCK_N)
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=True
        ):
            _tile(
                tile,
                x,
                weight,
                out,
                scale,
                bias,
                residual,
                norm_weight,
                norm_bias,
                rows,
                period,
                x_outer,
                x_inner,
                residual_stride,
                eps,
                inverse,
                limit,
                zero,
                COLUMNS,
                DEPTH,
                OVERLAP,
                HAS_BIAS,
                HAS_RESIDUAL,
                NORM,
                GELU,
                QUANTIZE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                GROUP,
            )
    else:
        _tile(
            tl.program_id(0),
            x,
            weight,
            out,
            scale,
            bias,
            residual,
            norm_weight,
            norm_bias,
            rows,
            period,
            x_outer,
            x_inner,
            residual_stride,
            eps,
            inverse,
            limit,
            zero,
            COLUMNS,
            DEPTH,
            OVERLAP,
            HAS_BIAS,
            HAS_RESIDUAL,
            NORM,
            GELU,
            QUANTIZE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            GROUP,
        )


def _candidates(
    rows: int,
    columns: int,
    depth: int,
    norm: bool,
    residual: bool,
    device: torch.device,
) -> list[Config]:
    if norm:
        width = max(triton.next_power_of_2(columns), 32)
        tiles = [Config(m, width, k, w, s) for m, k, w, s in ROW_TILES]
        lasting = {
            c
            for c in tiles
            if (c.block_m, c.block_k, c.num_warps, c.num_stages)
            in PERSISTENT_ROWS
        }
    else:
        tiles = [c for c in TILES if depth % c.block_k == 0] or RAGGED_TILES
        lasting = PERSISTENT - {TILES[0]} if residual else PERSISTENT
    found = []
    for tile in rank(tiles, rows, columns, device):
        found.append(tile)
        # the same for all rows that are tuned as one
        blocks = triton.cdiv(shape_bucket(rows), tile.block_m)
        blocks *= triton.cdiv(columns, tile.block_n)
        # there is no other tile to go on to where all fit at once
        if tile in lasting and blocks > _at_once(tile, device):
            found.append(replace(tile, persistent=True))
    return found


def _at_once(tile: Config, device: torch.device) -> int:
    """Blocks that run at once: the registers of a multiprocessor hold eight
    warps with such sums, and its memory some tiles."""
    limits = device_limits(device)
    fit = limits.shared_bytes // tile.shared_bytes()
    return limits.processors * max(min(8 // tile.num_warps, fit), 1)


def _launch(
    name,
    x,
    period,
    x_outer,
    x_inner,
    weight,
    out,
    scale,
    bias,
    residual,
    norm,
    gelu,
    inverse,
    limit,
    zero,
    config=None,
):
    """Runs the kernel; ``out`` is [rows, columns], ``x`` anything with rows at
    ``(m // period) * x_outer + (m % period) * x_inner``; without a ``period``
    at ``m * x_inner``."""
    rows, columns = out.shape
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)

    def run(tile: Config) -> None:
        blocks = triton.cdiv(rows, tile.block_m) * triton.cdiv(
            columns, tile.block_n
        )
        if tile.persistent:
            blocks = min(blocks, _at_once(tile, out.device))
        # An argument that is not there is never read: any pointer will do.
        matmul_kernel[(blocks,)](
            x,
            weight,
            out,
            scale,
            scale if bias is None else bias,
            out if residual is None else residual,
            scale if norm_weight is None else norm_weight,
            scale if norm_bias is None else norm_bias,
            rows,
            period or rows,
            x_outer,
            x_inner,
            0 if residual is None else residual.stride(0),
            eps,
            inverse,
            float(limit),
            float(zero),
            COLUMNS=columns,
            DEPTH=weight.shape[1],
            OVERLAP=period is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            NORM=norm is not None,
            GELU=gelu,
            QUANTIZE=out.dtype == torch.int8,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP=8,
            PERSISTENT=tile.persistent,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    if config is None:
        config = select(
            f"{name}/{shape_bucket(rows)}x{columns}x{weight.shape[1]}"
            f"/{int(norm is not None)}{int(gelu)}{int(residual is not None)}"
            f"/{str(out.dtype).removeprefix('torch.')}",
            _candidates(
                rows,
                columns,
                weight.shape[1],
                norm is not None,
                residual is not None,
                out.device,
            ),
            run,
            lambda: out,
        )
    run(config)


def launch_linear(
    q,
    weight,
    scale,
    bias,
    residual,
    gelu,
    dtype,
    inverse=1.0,
    limit=127,
    zero=0,
    config: Config | None = None,
) -> torch.Tensor:
    """:func:`reference_linear` in Triton; rows of ``q`` and ``residual`` may
    be strided. ``config`` overrides the choice of the tile."""
    check_int8("linear", q=q, weight=weight)
    rows = check_rows("linear", q)
    out_shape = (*q.shape[:-1], weight.shape[0])
    out = torch.empty(out_shape, dtype=dtype, device=q.device)
    _launch(
        "linear",
        rows,
        None,
        0,
        rows.stride(0),
        weight,
        out.view(-1, weight.shape[0]),
        scale,
        bias,
        None if residual is None else check_rows("linear", residual),
        None,
        gelu,
        inverse,
        limit,
        zero,
        config,
    )
    return out


def launch_conv1d(
    q,
    weight,
    scale,
    bias,
    kernel,
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
    """:func:`reference_conv1d` in Triton. ``config`` overrides the choice of
    the tile; with a norm its ``block_n`` must hold all channels."""
    check_int8("conv1d", q=q, weight=weight)
    frames = _check_conv("conv1d", q, kernel, stride)
    columns = weight.shape[0]
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps)
    if norm is not None and columns > MAX_NORM_CHANNELS:
        raise ValueError(
            f"stablequant::conv1d: a LayerNorm over {columns} channels cannot "
            f"be fused, at most {MAX_NORM_CHANNELS}; call layer_norm after it"
        )
    out = torch.empty(
        (q.shape[0], frames, columns), dtype=dtype, device=q.device
    )
    _launch(
        "conv1d",
        q,
        frames,
        q.stride(0),
        stride * q.shape[2],
        weight,
        out.view(-1, columns),
        scale,
        bias,
        None,
        norm,
        gelu,
        inverse,
        limit,
        zero,
        config,
    )
    return out


def shape_linear(
    q,
    weight,
    scale,
    bias,
    residual,
    gelu,
    dtype,
    inverse=1.0,
    limit=127,
    zero=0,
):
    """An empty result."""
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


def shape_conv1d(
    q,
    weight,
    scale,
    bias,
    kernel,
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
    frames = (q.shape[1] - kernel) // stride + 1
    return q.new_empty((q.shape[0], frames, weight.shape[0]), dtype=dtype)


declare(
    "linear",
    "(Tensor q, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, "
    "bool gelu, ScalarType dtype, float inverse=1.0, int limit=127, "
    "int zero=0) -> Tensor",
    reference_linear,
    launch_linear,
    shape_linear,
)
declare(
    "conv1d",
    "(Tensor q, Tensor weight, Tensor scale, Tensor? bias, int kernel, "
    "int stride, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "bool gelu, ScalarType dtype, float inverse=1.0, int limit=127, "
    "int zero=0) -> Tensor",
    reference_conv1d,
    launch_conv1d,
    shape_conv1d,
)
