"""LayerNorm over the channels: to int8, to floating point, or to both.

A post-norm block needs both: integers for its product, 16 bit for its residual
stream.
"""

import torch
import triton
import triton.language as tl

from .device import affine_columns, gelu_erf, standardize_rows, store_tile
from .library import check_rows, declare
from .plain import finish
from .tiles import FUSED, Config, shape_bucket
from .tuning import compared, select, tuning_key


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    gelu: bool, dtype: torch.dtype, inverse: float = 1.0, limit: int = 127,
    zero: int = 0,
) -> torch.Tensor:  # fmt: skip
    """LayerNorm over the last axis of float ``x``, GELU, then int8 or float."""
    norm = (weight, bias, eps)
    return finish(x.float(), gelu, dtype, inverse, limit, zero, norm)


def reference_both(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    dtype: torch.dtype, inverse: float, limit: int, zero: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """LayerNorm as float of ``dtype`` and as int8, in one pass."""
    norm = (x, weight, bias, eps, False)
    end = (torch.int8, inverse, limit, zero)
    return reference(*norm, dtype), reference(*norm, *end)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x, out, out_int8, weight, bias, rows, x_stride, eps, inverse, limit, zero,
    COLUMNS: tl.constexpr, GELU: tl.constexpr, QUANTIZE: tl.constexpr,
    BOTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = column < COLUMNS
    mask = (row[:, None] < rows) & inside[None, :]
    row = row.to(tl.int64)[:, None]
    y = tl.load(x + row * x_stride + column[None, :], mask=mask, other=0.0)
    y = standardize_rows(y.to(tl.float32), inside[None, :], eps, COLUMNS)
    y = affine_columns(y, weight, bias, column, inside)
    if GELU:
        y = gelu_erf(y)
    offsets = row * COLUMNS + column[None, :]
    store_tile(out, offsets, y, inverse, limit, zero, mask, QUANTIZE)
    if BOTH:
        store_tile(
            out_int8, offsets, y, inverse, limit, zero, mask, QUANTIZE=True
        )


def _candidates(columns: int) -> list[Config]:
    """One warp per row needs no barrier; several warps share the work."""
    width = triton.next_power_of_2(columns)
    rows = max(1024 // width, 1)
    if width <= 1024:
        return [Config(rows, width, 1, warps, 1) for warps in (1, 4)]
    return [Config(rows, width, 1, 4 if width <= 2048 else 8, 1)]


def launch(
    x, weight, bias, eps, gelu, dtype, inverse=1.0, limit=127, zero=0,
    config: Config | None = None, both: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`reference` in Triton, or `reference_both`; rows of ``x`` may be strided.
    ``config`` overrides the tile, which holds whole rows."""
    rows = check_rows("layer_norm", x)
    count, columns = rows.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    out_int8 = out
    if both:
        out_int8 = torch.empty(x.shape, dtype=torch.int8, device=x.device)

    def run(tile: Config) -> None:
        layer_norm_kernel[(triton.cdiv(count, tile.block_m),)](
            rows, out, out_int8, weight, bias, count, rows.stride(0),
            eps, inverse, float(limit), float(zero),
            COLUMNS=columns, GELU=gelu, QUANTIZE=dtype == torch.int8,
            BOTH=both, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            num_warps=tile.num_warps, **FUSED,
        )  # fmt: skip

    key = tuning_key(
        "layer_norm", (shape_bucket(count), columns), (gelu, both),
        x.dtype, dtype,
    )  # fmt: skip

    def expected(entries: torch.Tensor) -> torch.Tensor:
        return reference(
            x[entries], weight, bias, eps, gelu, dtype, inverse, limit, zero
        )

    tiles = _candidates(columns)
    run(config or select(key, tiles, run, compared(out, expected)))
    return (out, out_int8) if both else out


def launch_both(
    x, weight, bias, eps, dtype, inverse, limit, zero=0,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`reference_both` in Triton."""
    return launch(
        x, weight, bias, eps, False, dtype, inverse, limit, zero, config, True
    )


declare("layer_norm", reference, launch)
declare("layer_norm_both", reference_both, launch_both)
