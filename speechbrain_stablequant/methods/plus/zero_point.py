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
from ...model.layers import Encoder, Layer, layer_names
from ...simulation.observers import Observer

_CANDIDATES = 192
_POINTS = 4  # points in a bin, which may be as wide as a quantization step


def behind_gelu(encoders: list[Encoder], layers: list[Layer]) -> set[str]:
    """Names of layers whose input is the output of a GELU."""
    pairs = []
    for encoder in encoders:
        model = encoder.model
        for before, after in pairwise(model.feature_extractor.conv_layers):
            pairs.append((before.activation, after.conv))
        for block in model.encoder.layers:
            forward = block.feed_forward
            pairs.append((forward.intermediate_act_fn, forward.output_dense))
    found = (layer for activation, layer in pairs if _gelu(activation))
    return layer_names(layers, found)


def _gelu(activation: object) -> bool:
    kinds = ("GELU", "GELUActivation")
    return activation is F.gelu or type(activation).__name__ in kinds


class ShiftedObserver(Observer):
    """Histograms of ``input - GELU_MIN``, which is not negative."""

    def _collect(
        self, histogram: Histogram, x: torch.Tensor, time_axis: int
    ) -> None:
        super()._collect(histogram, x.float() - GELU_MIN, time_axis)


def asymmetric_range(
    shifted: Histogram, bits: int, upper: float, search: bool = True
) -> tuple[float, float]:
    """amax (half of the range) and zero point for an input behind a GELU.

    ``upper``: the largest input that is represented. ``search``: whether to try
    smaller upper ends, by least squared error. The zero point, the middle of
    the range, is a whole number of steps.
    """
    levels = 2 * qmax(bits)
    upper = max(upper, 1e-6)
    tops = torch.tensor([upper], dtype=torch.float64)
    if search:
        exponents = torch.linspace(0, 1, _CANDIDATES, dtype=torch.float64)
        tops = upper * 64.0 ** (exponents - 1)
    candidates = []
    for top in tops.tolist():
        nearest = int(-GELU_MIN * levels / (top - GELU_MIN))
        for below in {nearest, 0, 1, nearest + 1}:
            if 0 <= below < levels:
                # Keeps the upper end exact.
                candidates.append((top / (levels - below), below))
    # Points of the input in each bin, clamped to the upper end.
    index = shifted.counts.nonzero().squeeze(1)
    inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    x = (index[:, None] + inside) * shifted.bin_width + GELU_MIN
    mass = (shifted.counts[index].double() / _POINTS)[:, None].expand_as(x)
    x, mass = x.reshape(-1).clamp(GELU_MIN, upper), mass.reshape(-1)

    def error(step: tuple[float, int]) -> float:
        scale, below = step
        grid = (x / scale).round_().clamp_(-below, levels - below) * scale
        return float(((x - grid).square_() * mass).sum())

    scale, below = min(candidates, key=error)
    half = levels // 2
    return half * scale, (half - below) * scale
