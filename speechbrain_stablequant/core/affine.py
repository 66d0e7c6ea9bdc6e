"""Symmetric uniform quantization as pure tensor functions.

For ``b`` bits, ``qmax = 2^(b-1) - 1``, ``scale = amax / qmax`` and

    q = clamp(round(x * (1 / scale)), -qmax, qmax)

in float32, with ties rounded to even. Multiplying by the reciprocal gives the
bits of ``torch.fake_quantize_per_tensor_affine``; a division does not. A scale
has one float32 element, or one per slice of the first axis, which is a weight's
output channels.
"""

import torch

#: Smallest amax, so that a dead channel or silence has no scale of 0.
MIN_AMAX = 1e-8

#: Supported widths.
MIN_BITS, MAX_BITS = 2, 8

FLOAT_BITS = 16  #: stands for floating point
GELU_MIN = -0.17  #: lower bound of GELU (its minimum is -0.16997)

# Weights searched at once. On a CPU a chunk and its error stay in the cache;
# on a GPU few large chunks mean few kernel launches.
_CHUNK_CPU = 1 << 17
_CHUNK_GPU = 1 << 24

# Candidates of the search for a weight's ranges, and of its refinement.
_GRID = 100
_REFINE = 10


def qmax(bits: int) -> int:
    """Returns the largest integer, ``2^(bits-1) - 1``."""
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, "
            f"got {bits!r}"
        )
    return 2 ** (bits - 1) - 1


def scale_from_amax(amax: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the float32 scales of magnitudes, raised to ``MIN_AMAX``."""
    amax = amax.detach().to(torch.float32)
    if not bool(torch.isfinite(amax).all()) or bool((amax < 0).any()):
        raise ValueError(
            "amax must be finite and not negative; look for NaN or Inf in "
            "the weights or in the calibration data"
        )
    return amax.clamp(min=MIN_AMAX) / qmax(bits)


def quantize(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    limit = qmax(bits)
    q = torch.round(x.detach().to(torch.float32) * (1.0 / _spread(scale, x)))
    return q.clamp_(-limit, limit).to(torch.int8)


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return q.to(torch.float32) * _spread(scale, q)


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """``dequantize(quantize(x))``, four times as fast as torch's operators."""
    limit, scale = qmax(bits), _spread(scale, x)
    return (x * (1.0 / scale)).round_().clamp_(-limit, limit).mul_(scale)


def _spread(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshapes scales to broadcast against a tensor."""
    return scale.reshape(-1, *(1,) * (x.dim() - 1))


def weight_scale(
    weight: torch.Tensor,
    bits: int,
    method: str,
    energy: torch.Tensor | None = None,
) -> torch.Tensor:
    return scale_from_amax(weight_amax(weight, bits, method, energy), bits)


@torch.no_grad()
def weight_amax(
    weight: torch.Tensor,
    bits: int,
    method: str,
    energy: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the float32 amax of each output channel, by ``"max"`` or
    ``"mse"``.

    ``mse`` tries 100 fractions of the channel's maximum on the raw values and
    refines around the best, so it is never worse than ``max``. With ``energy``,
    the mean square of each input, it is the error of the output that counts,
    as far as inputs are independent.
    """
    limit = qmax(bits)
    rows = weight.detach().to(torch.float32).flatten(1)
    amax = rows.abs().amax(1)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("a weight holds NaN or Inf; load another checkpoint")
    amax = amax.clamp(min=MIN_AMAX)
    if method == "max":
        return amax
    chunk = _CHUNK_CPU if rows.device.type == "cpu" else _CHUNK_GPU
    step = max(1, chunk // rows.shape[1])
    parts = zip(rows.split(step), amax.split(step), strict=True)
    inputs = None if energy is None else energy.float().clamp(min=0).sqrt()
    return torch.cat(
        [
            _search_channels(part.abs(), top, limit, inputs)
            for part, top in parts
        ]
    )


def _search_channels(
    rows: torch.Tensor,
    top: torch.Tensor,
    limit: int,
    inputs: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the best amax of each row of magnitudes; `top` is its max."""
    work = torch.empty_like(rows)

    def better(amax, best, least):
        amax = amax.clamp(min=MIN_AMAX).minimum(top)
        error = _row_errors(rows, amax, limit, inputs, work)
        return torch.where(error < least, amax, best), error.minimum(least)

    best, least = top, _row_errors(rows, top, limit, inputs, work)
    for i in range(1, _GRID):
        best, least = better(top * (i / _GRID), best, least)
    center, spacing = best, top / (_GRID * _REFINE)
    for i in range(1 - _REFINE, _REFINE):
        best, least = better(center + i * spacing, best, least)
    return best


def _row_errors(
    rows: torch.Tensor,
    amax: torch.Tensor,
    limit: int,
    inputs: torch.Tensor | None,
    work: torch.Tensor,
) -> torch.Tensor:
    """Returns the root of the squared error of each row times its `inputs`;
    `work` is scratch."""
    scale = (amax / limit)[:, None]
    torch.mul(rows, 1.0 / scale, out=work)
    work.round_().clamp_(max=limit).mul_(scale).sub_(rows)
    if inputs is not None:
        work.mul_(inputs)
    return torch.linalg.vector_norm(work, dim=1)
