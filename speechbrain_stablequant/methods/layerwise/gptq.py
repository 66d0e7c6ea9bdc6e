"""Rounding with error compensation: Frantar et al., "GPTQ" (2023).

The weights of a row are rounded one input after the other; the inputs that
are still free compensate each error. With E[x q'] the target is the float
model's output instead of the float weights' output on quantized inputs:
errors of earlier layers are compensated as well.

Both are least squares on moments of a sample. With few rows for many inputs,
as in a decoder, which sees one row for each token, they fit the sample's noise:
the dampening of ridge regression grows with inputs / rows, as the variance of
its solution does (Hoerl, Kennard and Baldwin, "Ridge Regression", 1975).
"""

import math
from dataclasses import dataclass

import torch

from ...core.affine import qmax, weight_scale

_BLOCK = 128

# Rows that are rounded at once, by several scales each: the output projection
# of a decoder has one for each token of its vocabulary.
_ROWS = 4096

#: Scales that are tried for each row, relative to the one of least error of
#: the nearest integers.
_FRACTIONS = (1.15, 1.0, 0.85, 0.7)


@dataclass(frozen=True)
class Compensate:
    """Finds integers by error compensation (GPTQ).

    ``damping`` plus inputs / rows is added to the diagonal of the Hessian, as a
    fraction of its mean; ``cross``: whether the output of the float model is
    the target. Each row has the best of several scales: of least squared error
    of its weights, or around that of these times the energy of their inputs.
    """

    damping: float = 0.01
    cross: bool = True

    @torch.no_grad()
    def __call__(
        self,
        weight: torch.Tensor,
        bits: int,
        method: str,
        gram: torch.Tensor,
        cross: torch.Tensor | None = None,
        rows: float = math.inf,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`~.reconstruct.Solve`."""
        gram = gram.clone()
        diagonal = gram.diagonal()
        # Inputs that are always zero: any weight is right.
        dead = diagonal <= 0
        damping = self.damping + len(gram) / rows
        ridge = float(damping * diagonal.clamp(min=0).mean())
        diagonal += ridge if ridge > 0 else 1.0
        if self.cross and cross is not None:
            weight = _aimed_at_float_output(weight, gram, cross, ridge, dead)
        # Inputs of large energy first, while most columns are still free.
        order = gram.diagonal().argsort(descending=True)
        sorted_gram = gram[order][:, order]
        upper = _inverse_factor(sorted_gram)
        parts = []
        for part in weight.split(_ROWS):
            scales = _scales(part, bits, method, gram.diagonal())
            found, scale = _best_rounding(
                part[:, order], scales, sorted_gram, upper, qmax(bits)
            )
            integers = torch.empty_like(found, dtype=torch.int8)
            integers[:, order] = found.to(torch.int8)
            parts.append((integers, scale))
        integers, scale = map(torch.cat, zip(*parts, strict=True))
        return integers, scale


def _scales(
    weight: torch.Tensor, bits: int, method: str, energy: torch.Tensor
) -> list[torch.Tensor]:
    """The scales to try for each row."""
    # The scale of the weights alone may cut off those of inputs that matter
    # most; energy alone does not know what inputs have in common.
    scales = [weight_scale(weight, bits, method)]
    if method != "max":
        weighed = weight_scale(weight, bits, method, energy)
        scales += [fraction * weighed for fraction in _FRACTIONS]
    return scales


def _best_rounding(
    weight: torch.Tensor,
    scales: list[torch.Tensor],
    gram: torch.Tensor,
    upper: torch.Tensor,
    limit: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales of the least output error for each row."""
    scale = torch.cat(scales)
    weight = weight.repeat(len(scales), 1)
    found = _sweep(weight, scale, upper, limit)
    change = weight - found * scale[:, None]
    errors = ((change @ gram) * change).sum(1)
    count = len(errors) // len(scales)
    best = errors.view(-1, count).argmin(0) * count
    best += torch.arange(count, device=best.device)
    return found[best], scale[best]


def _aimed_at_float_output(
    weight: torch.Tensor,
    damped: torch.Tensor,
    cross: torch.Tensor,
    ridge: float,
    dead: torch.Tensor,
) -> torch.Tensor:
    """W (E[x q'] + r) (E[q q'] + r)^-1; for a large r the float weights."""
    right = cross.clone()
    right.diagonal().add_(ridge)
    factor = _cholesky(damped)
    moved = torch.cholesky_solve((weight @ right).T, factor).T
    return torch.where(dead, weight, moved)


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Lower factor, with more dampening if rounding made it indefinite."""
    extra = 0.0
    mean = float(matrix.diagonal().mean())
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(8):
        factor, info = torch.linalg.cholesky_ex(matrix + extra * eye)
        if int(info) == 0:
            return factor
        extra = max(10 * extra, 1e-3 * mean)
    raise ValueError(
        "the Hessian of its inputs is not finite; look for NaN in the "
        "calibration data"
    )


def _inverse_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Upper factor U of the inverse: U'U = matrix^-1."""
    inverse = torch.cholesky_inverse(_cholesky(matrix))
    return _cholesky(inverse).T.contiguous()


def _sweep(
    weight: torch.Tensor,
    scale: torch.Tensor,
    upper: torch.Tensor,
    limit: int,
) -> torch.Tensor:
    """Rounds column by column; later columns compensate each error."""
    weight = weight.clone()
    found = torch.empty_like(weight)
    inputs = weight.shape[1]
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = torch.empty_like(weight[:, start:stop])
        for i in range(start, stop):
            column = weight[:, i]
            q = (column / scale).round_().clamp_(-limit, limit)
            found[:, i] = q
            error = (column - q * scale) / upper[i, i]
            errors[:, i - start] = error
            weight[:, i:stop] -= torch.outer(error, upper[i, i:stop])
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return found
