"""A linear layer on integers; see ``matmul`` for the kernel."""

import torch

from .library import check_dtype, check_rows, declare
from .matmul import Rows, launch_matmul
from .plain import finish, scaled
from .tiles import Config


def reference(
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


def launch(
    q, weight, scale, bias, residual, gelu, dtype,
    inverse=1.0, limit=127, zero=0, config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """`reference` in Triton; rows of ``q`` and ``residual`` may be strided.
    ``config`` overrides the tile."""
    check_dtype("linear", torch.int8, q=q, weight=weight)
    rows = check_rows("linear", q)
    columns = weight.shape[0]
    out = torch.empty((*q.shape[:-1], columns), dtype=dtype, device=q.device)
    launch_matmul(
        "linear", Rows(rows, rows.stride(0)), weight,
        out.view(-1, columns), scale, bias,
        None if residual is None else check_rows("linear", residual),
        (None, None, 0.0), gelu, (inverse, limit, zero), config,
    )  # fmt: skip
    return out


declare("linear", reference, launch)
