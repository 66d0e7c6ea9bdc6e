"""A linear layer on integers; see ``matmul`` for the kernel."""

import torch

from .library import check_int8, check_rows, declare
from .matmul import Rows, launch_matmul
from .plain import finish, scaled
from .tiles import Config


def reference(
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
    """``gelu(q @ weight.T * scale + bias) + residual``: int8 ``q`` [..., in]
    and ``weight`` [out, in] to [..., out]."""
    check_int8("linear", q=q, weight=weight)
    # float64 holds every such sum exactly and is fast on CPU
    y = scaled(q.double() @ weight.double().T, scale, bias)
    return finish(y, gelu, dtype, inverse, limit, None, residual, zero)


def launch(
    q, weight, scale, bias, residual, gelu, dtype,
    inverse=1.0, limit=127, zero=0, config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """`reference` in Triton; rows of ``q`` and ``residual`` may be strided.
    ``config`` overrides the tile."""
    check_int8("linear", q=q, weight=weight)
    rows = check_rows("linear", q)
    out_shape = (*q.shape[:-1], weight.shape[0])
    out = torch.empty(out_shape, dtype=dtype, device=q.device)
    launch_matmul(
        "linear", Rows(rows, rows.stride(0)), weight,
        out.view(-1, weight.shape[0]), scale, bias,
        None if residual is None else check_rows("linear", residual),
        None, gelu, (inverse, limit, zero), config,
    )  # fmt: skip
    return out


def shape(
    q, weight, scale, bias, residual, gelu, dtype,
    inverse=1.0, limit=127, zero=0,
):  # fmt: skip
    """Empty result of the right shape, for torch.compile."""
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


declare(
    "linear",
    "(Tensor q, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, "
    "bool gelu, ScalarType dtype, float inverse=1.0, int limit=127, "
    "int zero=0) -> Tensor",
    reference,
    launch,
    shape,
)
