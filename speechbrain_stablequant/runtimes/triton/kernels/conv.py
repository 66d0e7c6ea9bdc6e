"""A strided convolution on integers; see ``matmul`` for the kernel.

With channels innermost, the window of a convolution is contiguous: row t of
the implicit matrix starts ``stride`` frames after row t - 1 and is
``kernel * channels`` long. The convolution is a product with overlapping rows.
"""

import torch

from .library import check_contiguous, check_dtype, declare, output_frames
from .matmul import Rows, launch_matmul
from .plain import finish, scaled
from .tiles import Config


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, kernel] to [out, kernel * in], the layout of the product."""
    return weight.transpose(1, 2).reshape(weight.shape[0], -1).contiguous()


def _checked_frames(
    q: torch.Tensor, weight: torch.Tensor, kernel: int, stride: int
) -> int:
    """Number of output frames; raises for an input that has no kernel."""
    check_dtype("conv1d", torch.int8, q=q, weight=weight)
    check_contiguous("conv1d", "q", q)
    return output_frames("conv1d", q.shape[1], kernel, stride)


def reference(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, kernel: int, stride: int,
    norm_weight: torch.Tensor | None, norm_bias: torch.Tensor | None,
    eps: float, gelu: bool, dtype: torch.dtype, inverse: float = 1.0,
    limit: int = 127, zero: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Convolution without padding, LayerNorm, GELU: int8 ``q`` [batch, time,
    in], contiguous, and ``weight`` from `pack_weight` to [batch, frames, out].
    """
    frames = _checked_frames(q, weight, kernel, stride)
    batch, _, channels = q.shape
    windows = q.as_strided(
        (batch, frames, kernel * channels),
        (q.stride(0), stride * channels, 1),
    )
    y = scaled(windows.double() @ weight.double().T, scale, bias)
    norm = (norm_weight, norm_bias, eps)
    return finish(y, gelu, dtype, inverse, limit, zero, norm)


def launch(
    q, weight, scale, bias, kernel, stride, norm_weight, norm_bias, eps,
    gelu, dtype, inverse=1.0, limit=127, zero=0,
    config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """`reference` in Triton. ``config`` overrides the tile; with a norm its
    ``block_n`` must hold all channels."""
    frames = _checked_frames(q, weight, kernel, stride)
    columns = weight.shape[0]
    out_shape = (q.shape[0], frames, columns)
    out = torch.empty(out_shape, dtype=dtype, device=q.device)
    launch_matmul(
        "conv1d", Rows(q, stride * q.shape[2], frames, q.stride(0)), weight,
        out.view(-1, columns), scale, bias, None,
        (norm_weight, norm_bias, eps), gelu, (inverse, limit, zero), config,
    )  # fmt: skip
    return out


declare("conv1d", reference, launch)
