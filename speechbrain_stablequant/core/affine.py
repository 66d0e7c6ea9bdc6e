"""Symmetric uniform quantization as pure tensor functions.

For `b` bits the integers lie in the narrow range `[-qmax, qmax]` with
`qmax = 2^(b-1) - 1`, the zero point is 0 and

    scale = amax / qmax
    q     = clamp(round(x * (1 / scale)), -qmax, qmax)

with ties rounded to even. A scale belongs to the whole tensor (`axis=None`)
or to each slice along `axis` (the output channels of a weight).

All arithmetic is float32 and multiplies by the reciprocal of the scale,
because `torch.fake_quantize_per_tensor_affine` and
`torch.fake_quantize_per_channel_affine` do: a division differs from them on
values near a tie. So `dequantize(quantize(x))` equals `fake_quantize(x)` bit
for bit, and an integer runtime can be compared exactly with the simulation.
"""

import torch

#: Smallest amax, so that a dead channel or silence has no scale of 0.
MIN_AMAX = 1e-8

#: Supported widths.
MIN_BITS, MAX_BITS = 2, 8

#: Lower bound of GELU (its minimum is -0.16997).
GELU_MIN = -0.17


def qmax(bits: int) -> int:
    """Returns the largest integer of a symmetric narrow range, ``2^(bits-1) -
    1``."""
    is_int = isinstance(bits, int) and not isinstance(bits, bool)
    if not is_int or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, "
            f"got {bits!r}"
        )
    return 2 ** (bits - 1) - 1


def scale_from_amax(amax: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the float32 scales ``amax / qmax``; ``amax`` is raised to
    ``MIN_AMAX`` where it is below."""
    limit = qmax(bits)
    amax = amax.detach().to(torch.float32)
    if not bool(torch.isfinite(amax).all()) or bool((amax < 0).any()):
        raise ValueError(
            "amax must be finite and not negative; look for NaN or Inf in "
            "the weights or in the calibration data"
        )
    return amax.clamp(min=MIN_AMAX) / limit


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    axis: int | None = None,
) -> torch.Tensor:
    """Quantizes a tensor to int8; ``scale`` has one element, or one per slice
    along ``axis``."""
    limit = qmax(bits)
    inverse = 1.0 / _spread(scale, x, axis)
    q = torch.round(x.to(torch.float32) * inverse)
    return q.clamp_(-limit, limit).to(torch.int8)


def dequantize(
    q: torch.Tensor, scale: torch.Tensor, axis: int | None = None
) -> torch.Tensor:
    """Returns ``q * scale`` in float32; ``scale`` runs along ``axis`` if there
    is one."""
    return q.to(torch.float32) * _spread(scale, q, axis)


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    axis: int | None = None,
) -> torch.Tensor:
    """Rounds a tensor to its quantization grid, in its own dtype.

    Equals ``dequantize(quantize(x))`` bit for bit in float32. It runs torch's
    operators, which exporters know and which have a straight-through gradient.
    """
    limit = qmax(bits)
    _check_scale(scale, x, axis)
    if axis is None and _can_run_in_place(x):
        # The same values four times as fast as torch's operator.
        q = x * (1.0 / scale.reshape(()))
        return q.round_().clamp_(-limit, limit).mul_(scale.reshape(()))
    # torch takes a tensor zero point beside a tensor scale: no read of the
    # scale's value on the host, so nothing waits for a GPU.
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(
            x,
            scale.reshape(()),
            torch.zeros((), dtype=torch.int32, device=scale.device),
            -limit,
            limit,
        )
    return torch.fake_quantize_per_channel_affine(
        x,
        scale,
        torch.zeros(scale.shape, dtype=torch.int32, device=scale.device),
        axis % x.dim(),
        -limit,
        limit,
    )


def _can_run_in_place(x: torch.Tensor) -> bool:
    """Whether torch's own operator is not needed: no gradient, tracing or
    compiler."""
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    followed = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return x.dtype == torch.float32 and not wants_gradient and not followed


def _check_scale(
    scale: torch.Tensor, x: torch.Tensor, axis: int | None
) -> None:
    """Raises unless `scale` has the shape and dtype that `axis` asks for."""
    if torch.jit.is_tracing():
        return  # shapes are traced values here: a comparison would warn
    if scale.dtype != torch.float32:
        raise ValueError(f"scale must be float32, got {scale.dtype}")
    if axis is None:
        if scale.numel() != 1:
            raise ValueError(
                f"scale has {scale.numel()} values but axis is None; "
                "name the axis that it runs along"
            )
    elif not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis {axis} is outside a tensor of {x.dim()} axes")
    elif scale.shape != (x.shape[axis],):
        raise ValueError(
            f"scale has shape {list(scale.shape)}, axis {axis} of the tensor "
            f"needs [{x.shape[axis]}]"
        )


def _spread(
    scale: torch.Tensor, x: torch.Tensor, axis: int | None
) -> torch.Tensor:
    """Returns `scale` in a shape that broadcasts against `x`."""
    _check_scale(scale, x, axis)
    if axis is None:
        return scale.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape)
