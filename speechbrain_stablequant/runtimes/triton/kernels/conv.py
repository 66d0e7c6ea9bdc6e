"""A strided convolution on integers; see ``matmul`` for the kernel.

With channels innermost, the window of a convolution is contiguous: row t of
the implicit matrix starts ``stride`` frames after row t - 1 and is
``kernel * channels`` long. The convolution is a product with overlapping rows.
"""

import torch

from .library import check_int8, declare
from .matmul import Rows, check_norm_width, launch_matmul
from .plain import finish, scaled
from .tiles import Config


def frames_out(frames: int, kernel: int, stride: int) -> int:
    """Number of output frames of a convolution without padding."""
    return max((frames - kernel) // stride + 1, 0)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, kernel] to [out, kernel * in], the layout of the product."""
    return weight.transpose(1, 2).reshape(weight.shape[0], -1).contiguous()


def _check_input(q: torch.Tensor, kernel: int, stride: int) -> int:
    """Number of output frames; raises for an input that has no kernel."""
    if q.dim() != 3 or not q.is_contiguous():
        raise ValueError(
            "stablequant::conv1d: q must be contiguous [batch, time, "
            f"channels], got {list(q.shape)} with strides {list(q.stride())}"
        )
    frames = frames_out(q.shape[1], kernel, stride)
    if frames == 0:
        raise ValueError(
            f"stablequant::conv1d: {q.shape[1]} frames are fewer than the "
            f"kernel's {kernel}"
        )
    return frames


def reference(
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
    """Convolution without padding, LayerNorm, GELU: int8 ``q`` [batch, time,
    in], contiguous, and ``weight`` from `pack_weight` to [batch, frames, out].
    """
    check_int8("conv1d", q=q, weight=weight)
    frames = _check_input(q, kernel, stride)
    batch, _, channels = q.shape
    windows = q.as_strided(
        (batch, frames, kernel * channels),
        (q.stride(0), stride * channels, 1),
    )
    y = scaled(windows.double() @ weight.double().T, scale, bias)
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps)
    return finish(y, gelu, dtype, inverse, limit, norm, zero=zero)


def launch(
    q, weight, scale, bias, kernel, stride, norm_weight, norm_bias, eps,
    gelu, dtype, inverse=1.0, limit=127, zero=0,
    config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """`reference` in Triton. ``config`` overrides the tile; with a norm its
    ``block_n`` must hold all channels."""
    check_int8("conv1d", q=q, weight=weight)
    frames = _check_input(q, kernel, stride)
    columns = weight.shape[0]
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps)
    if norm is not None:
        check_norm_width("conv1d", columns)
    out_shape = (q.shape[0], frames, columns)
    out = torch.empty(out_shape, dtype=dtype, device=q.device)
    launch_matmul(
        "conv1d", Rows(q, stride * q.shape[2], frames, q.stride(0)), weight,
        out.view(-1, columns), scale, bias, None, norm, gelu,
        (inverse, limit, zero), config,
    )  # fmt: skip
    return out


def shape(
    q, weight, scale, bias, kernel, stride, norm_weight, norm_bias, eps,
    gelu, dtype, inverse=1.0, limit=127, zero=0,
):  # fmt: skip
    """Empty result of the right shape, for torch.compile."""
    frames = (q.shape[1] - kernel) // stride + 1
    return q.new_empty((q.shape[0], frames, weight.shape[0]), dtype=dtype)


declare(
    "conv1d",
    "(Tensor q, Tensor weight, Tensor scale, Tensor? bias, int kernel, "
    "int stride, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "bool gelu, ScalarType dtype, float inverse=1.0, int limit=127, "
    "int zero=0) -> Tensor",
    reference,
    launch,
    shape,
)
