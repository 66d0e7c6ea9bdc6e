"""int8 products for Hopper whose copies and products overlap, in Gluon.

Triton waits for each int8 ``wgmma`` before it goes on. Here a product is waited
for one step later, and the copies of the next steps are on their way meanwhile.
The kernel computes what ``matmul_kernel`` does without a norm.

No interpreter runs Gluon, so `tuning.select` takes these tiles only after their
result on the card equaled the exact one. The copies are ``cp.async`` rather
than TMA: without barriers of its own, a faulty kernel gives a wrong result,
which that comparison finds, and cannot wait forever.
"""

from dataclasses import replace

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import device
from .architectures import Card
from .library import INTERPRETED
from .tiles import Config, generate

#: Bytes of a row in one step: as many as shared memory is swizzled by.
STEP = 128
#: With fewer stages, a step would wait for copies that have just begun.
MIN_STAGES = 3

# renamed in Triton 3.9
_copy = getattr(async_copy, "async_load", None) or (
    async_copy.async_copy_global_to_shared
)
_gelu_erf = gluon.jit(device.gelu_erf.fn)
_halves = gluon.jit(device.halves.fn)
_round_to_int8 = gluon.jit(device.round_to_int8.fn)
_scale_and_bias = gluon.jit(device.scale_and_bias.fn)


def tiles(card: Card, depth: int, residual: bool) -> list[Config]:
    """Tiles for products of some depth; none on a card of another kind."""
    row = card.architecture
    if row.instruction != "wgmma" or depth % STEP or INTERPRETED:
        return []
    # the fence is in the kernel: any Triton compiles it right
    card = replace(card, version=max(card.version, row.triton))
    # registers would spill with 256 columns and a residual
    columns = (128, 64) if residual else (256, 128, 64)
    found = [
        replace(tile, gluon=True)
        for tile in generate(card, (256, 128, 64), columns, (STEP,))
        if tile.num_stages >= MIN_STAGES
        # a warp multiplies 16 rows at once
        and tile.block_m >= 16 * tile.num_warps
    ]
    # of an outline first the form of which two blocks fit
    return sorted(found, key=lambda tile: tile.num_stages)


@gluon.jit
def _copy_step(a, b, x, w, step, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """Starts the copies of one step of both factors."""
    _copy(a.index(step % STAGES), x + step * BLOCK_K)
    _copy(b.index(step % STAGES), w + step * BLOCK_K)


@gluon.jit(do_not_specialize=["rows", "period"])
def hopper_kernel(
    x, weight, out, scale, bias, residual, rows, period, x_outer, x_inner,
    residual_stride, inverse, limit, zero,
    COLUMNS: gl.constexpr, DEPTH: gl.constexpr, OVERLAP: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, GELU: gl.constexpr,
    QUANTIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    # Of the powers of two, Triton knows integer products of up to 128 columns.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS, 1], [16, min(128, BLOCK_N), 32]
    )
    # 16 bytes are one copy.
    COPIES: gl.constexpr = gl.BlockedLayout(
        [1, 16], [512 // BLOCK_K, BLOCK_K // 16], [WARPS, 1], [1, 0]
    )
    SHARED: gl.constexpr = gl.NVMMASharedLayout(BLOCK_K, 8)
    STEPS: gl.constexpr = DEPTH // BLOCK_K
    HALF: gl.constexpr = BLOCK_N // 2

    # In groups of GROUP rows: neighbors share operands in the cache.
    tile = gl.program_id(0)
    across = gl.cdiv(COLUMNS, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    height = gl.minimum(gl.cdiv(rows, BLOCK_M) - first, GROUP)
    top = (first + tile % (GROUP * across) % height) * BLOCK_M
    left = tile % (GROUP * across) // height * BLOCK_N

    # Rows and columns beyond the end repeat the last one: copies need no mask.
    m = top + gl.arange(0, BLOCK_M, gl.SliceLayout(1, COPIES))
    m = gl.minimum(m, rows - 1)
    n = left + gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPIES))
    n = gl.minimum(n, COLUMNS - 1)
    depth = gl.arange(0, BLOCK_K, gl.SliceLayout(0, COPIES))[None, :]
    if OVERLAP:
        start = (m // period).to(gl.int64) * x_outer
        start += (m % period).to(gl.int64) * x_inner
    else:
        start = m.to(gl.int64) * x_inner
    x_tile = x + start[:, None] + depth
    w_tile = weight + n[:, None] * DEPTH + depth
    a = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], SHARED)
    b = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], SHARED)

    # Each step is one group of copies, also an empty one: the step that is
    # needed next is always the oldest of STAGES - 1.
    for step in gl.static_range(STAGES - 1):
        if step < STEPS:
            _copy_step(a, b, x_tile, w_tile, step, BLOCK_K, STAGES)
        async_copy.commit_group()
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, SUMS)
    for step in range(STEPS):
        async_copy.wait_group(STAGES - 2)
        # wgmma reads by another path than cp.async writes
        fence_async_shared()
        acc = warpgroup_mma(
            a.index(step % STAGES),
            b.index(step % STAGES).permute((1, 0)),
            acc,
            is_async=True,
        )
        # the product before this one has read its buffers: they are next
        acc = warpgroup_mma_wait(1, deps=(acc,))
        ahead = step + STAGES - 1
        if ahead < STEPS:
            _copy_step(a, b, x_tile, w_tile, ahead, BLOCK_K, STAGES)
        async_copy.commit_group()
    acc = warpgroup_mma_wait(0, deps=(acc,))
    async_copy.wait_group(0)

    parts = _halves(acc, BLOCK_M, BLOCK_N)
    PART: gl.constexpr = parts[0].type.layout
    DTYPE: gl.constexpr = out.dtype.element_ty
    # 16 bytes are one store.
    VECTOR: gl.constexpr = 128 // DTYPE.primitive_bitwidth
    ALONG: gl.constexpr = min(32, HALF // VECTOR)
    STORES: gl.constexpr = gl.BlockedLayout(
        [1, VECTOR], [32 // ALONG, ALONG], [WARPS, 1], [1, 0]
    )
    row = (top + gl.arange(0, BLOCK_M, gl.SliceLayout(1, STORES)))[:, None]
    wide = row.to(gl.int64)
    for half in gl.static_range(2):
        column = left + half * HALF
        n = column + gl.arange(0, HALF, gl.SliceLayout(0, PART))
        y = _scale_and_bias(parts[half], scale, bias, n, n < COLUMNS, HAS_BIAS)
        if GELU:
            y = _gelu_erf(y)
        n = column + gl.arange(0, HALF, gl.SliceLayout(0, STORES))[None, :]
        mask = (row < rows) & (n < COLUMNS)
        if HAS_RESIDUAL:
            old = residual + wide * residual_stride + n
            old = gl.load(old, mask=mask, other=0.0)
            y += gl.convert_layout(old, PART).to(gl.float32)
        if QUANTIZE:
            y = _round_to_int8(y, inverse, limit, zero)
        y = gl.convert_layout(y.to(DTYPE), STORES)
        gl.store(out + wide * COLUMNS + n, y, mask=mask)
