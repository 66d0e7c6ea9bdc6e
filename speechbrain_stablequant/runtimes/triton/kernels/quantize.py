"""A float tensor to int8, after a GELU if asked."""

import torch
import triton
import triton.language as tl

from .device import gelu_erf, store_tile
from .library import check_rows, declare
from .plain import finish
from .tiles import FUSED


def reference(
    x: torch.Tensor, inverse: float, limit: int, gelu: bool = False,
    zero: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Float to int8, ``clamp(round(x * inverse + zero), -limit, limit)``."""
    return finish(x.float(), gelu, torch.int8, inverse, limit, zero)


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x, out, rows, x_stride, inverse, limit, zero,
    COLUMNS: tl.constexpr, GELU: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row[:, None] < rows) & (column[None, :] < COLUMNS)
    row = row.to(tl.int64)[:, None]
    y = tl.load(x + row * x_stride + column[None, :], mask=mask, other=0.0)
    y = y.to(tl.float32)
    if GELU:
        y = gelu_erf(y)
    offsets = row * COLUMNS + column[None, :]
    store_tile(out, offsets, y, inverse, limit, zero, mask, QUANTIZE=True)


def launch(x, inverse, limit, gelu=False, zero=0) -> torch.Tensor:
    """`reference` in Triton; rows of ``x`` may be strided."""
    rows = check_rows("quantize", x)
    count, columns = rows.shape
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    block_n = min(triton.next_power_of_2(columns), 1024)
    block_m = max(2048 // block_n, 1)
    grid = (triton.cdiv(count, block_m), triton.cdiv(columns, block_n))
    quantize_kernel[grid](
        rows, out, count, rows.stride(0), inverse, float(limit), float(zero),
        COLUMNS=columns, GELU=gelu, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=4, **FUSED,
    )  # fmt: skip
    return out


declare("quantize", reference, launch)
