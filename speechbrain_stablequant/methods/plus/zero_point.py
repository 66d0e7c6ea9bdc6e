"""Zero points: all integers for inputs that are hardly negative.

A GELU's output is above -0.17, so a symmetric range wastes almost half of the
integers. The zero point is a whole number of steps: zero stays exact, and its
constant product goes into the bias. Requires layers without zero padding: the
convolutions of the feature extractor, and linears.
"""

from itertools import pairwise

import torch
from torch.nn import functional as F

from ...core.affine import GELU_MIN, qmax
from ...core.histogram import Histogram
from ...model.layers import Encoder, Layer
from ...simulation.observers import Observer

_CANDIDATES = 192
# Points in a bin, which may be as wide as a quantization step.
_POINTS = 4


def behind_gelu(encoders: list[Encoder], layers: list[Layer]) -> set[str]:
    """Names of layers whose input is the output of a GELU."""
    found = set()
    for encoder in encoders:
        model = encoder.model
        convs = list(model.feature_extractor.conv_layers)
        pairs = [
            (before.activation, after.conv) for before, after in pairwise(convs)
        ]
        for block in model.encoder.layers:
            forward = block.feed_forward
            pairs.append((forward.intermediate_act_fn, forward.output_dense))
        found |= {id(layer) for activation, layer in pairs if _gelu(activation)}
    return {layer.name for layer in layers if id(layer.module) in found}


def _gelu(activation: object) -> bool:
    return type(activation).__name__ in ("GELU", "GELUActivation") or (
        activation is F.gelu
    )


class ShiftedObserver(Observer):
    """Histograms of ``input - GELU_MIN``, which is not negative."""

    def _collect(
        self, histogram: Histogram, x: torch.Tensor, time_axis: int
    ) -> None:
        super()._collect(histogram, x.float() - GELU_MIN, time_axis)


def asymmetric_range(
    shifted: Histogram,
    bits: int,
    upper: float,
    search: bool = True,
) -> tuple[float, float]:
    """Range and zero point for an input behind a GELU.

    Arguments
    ---------
    shifted : Histogram
        Of ``input - GELU_MIN``.
    bits : int
        Bits of the activations.
    upper : float
        Largest input that is represented.
    search : bool
        Whether to try smaller upper ends, by least squared error.

    Returns
    -------
    float
        amax: half of the range.
    float
        The middle of the range, a whole number of steps.
    """
    levels = 2 * qmax(bits)
    upper = max(upper, 1e-6)
    tops = torch.tensor([upper], dtype=torch.float64)
    if search:
        exponents = torch.linspace(0, 1, _CANDIDATES, dtype=torch.float64)
        tops = upper * 64.0 ** (exponents - 1)
    candidates = []
    for top in tops.tolist():
        span = top - GELU_MIN
        for below in {int(-GELU_MIN * levels / span), 0, 1} | {
            int(-GELU_MIN * levels / span) + 1
        }:
            if 0 <= below < levels:
                # Keeps the upper end exact.
                candidates.append((top / (levels - below), below))
    steps = torch.tensor(candidates, dtype=torch.float64)
    x, mass = _points(shifted, upper)
    errors = [
        _error(x, mass, float(scale), int(below), levels)
        for scale, below in steps.tolist()
    ]
    scale, below = candidates[min(range(len(errors)), key=errors.__getitem__)]
    half = levels // 2
    return half * scale, (half - below) * scale


def _points(
    shifted: Histogram, upper: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the input, clamped to the upper end, and their counts."""
    counts = shifted.counts
    index = counts.nonzero().squeeze(1)
    inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    values = (index[:, None] + inside) * shifted.bin_width + GELU_MIN
    mass = (counts[index].double() / _POINTS)[:, None].expand_as(values)
    return values.reshape(-1).clamp(GELU_MIN, upper), mass.reshape(-1)


def _error(
    x: torch.Tensor,
    mass: torch.Tensor,
    scale: float,
    below: int,
    levels: int,
) -> float:
    grid = (x / scale).round_().clamp_(-below, levels - below) * scale
    return float(((x - grid).square_() * mass).sum())
