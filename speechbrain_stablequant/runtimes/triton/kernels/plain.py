"""The operators' plain-torch references: what they share, and comparisons."""

import torch
from torch.nn import functional as F

#: For products of 16-bit factors, whose rounding depends on the tile.
HALF_TOLERANCE = 4 * torch.finfo(torch.float16).eps


def finish(
    y: torch.Tensor, gelu: bool, dtype: torch.dtype, inverse: float = 1.0,
    limit: int = 127, zero: int = 0,
    norm: tuple[torch.Tensor | None, torch.Tensor | None, float] | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """LayerNorm, GELU, residual, then quantizes float32 ``y`` [..., channels]
    or rounds it to ``dtype``; arguments as in the package's docstring."""
    if norm is not None and norm[0] is not None:
        weight, bias, eps = norm
        y = F.layer_norm(y, weight.shape, weight, bias, eps)
    if gelu:
        y = F.gelu(y)
    if residual is not None:
        y = y + residual.float()
    if dtype != torch.int8:
        return y.to(dtype)
    q = torch.round(y * inverse + zero)
    return q.clamp_(-limit, limit).to(torch.int8)


def scaled(
    total: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Exact sums [..., channels] to float32: ``total * scale + bias``."""
    y = total.float() * scale
    return y if bias is None else y + bias


def difference(
    found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5
) -> str | None:
    """How a kernel's result differs from the reference's; None if it does not.

    Integers may be one apart on 1 % of the values, where rounding meets a
    tie. Floats may differ by ``tolerance`` times the largest value, plus one
    unit in the last place of the dtype.
    """
    for what in ("shape", "dtype"):
        a, b = getattr(found, what), getattr(expected, what)
        if a != b:
            return f"has {what} {a} instead of {b}"
    if found.device != expected.device:
        found, expected = found.cpu(), expected.cpu()
    if not found.dtype.is_floating_point:
        apart = (found.int() - expected.int()).abs()
        largest, count = int(apart.max()), int((apart > 0).sum())
        # one value of a few is more than 1 %
        if largest > 1 or count > max(0.01 * apart.numel(), 1):
            return f"{count} of {apart.numel()} integers up to {largest} apart"
        return None
    if not found.isfinite().all():
        return "is not finite"
    unit = torch.finfo(found.dtype).eps
    wide, target = found.float(), expected.float()
    scale = float(target.abs().max())
    # in 16 bit, one unit of the largest value too, as values are summed
    limit = scale * max(tolerance, unit if unit > 1e-5 else 0.0)
    apart = (wide - target).abs()
    if bool((apart > limit + unit * target.abs()).any()):
        return (
            f"differs by up to {float(apart.max()):.3g}, where values are up "
            f"to {scale:.3g}"
        )
    return None
