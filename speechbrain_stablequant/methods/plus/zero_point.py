"""Activation offsets: all integers for an input that is hardly negative.

Behind a GELU nothing is below -0.17, so that half of the integers of a range
around zero are never used. With an offset of a whole number of steps the
range covers what occurs, zero stays exact, and the constant part of the
product goes into the bias. Only where no zeros are padded: the convolutions
of the feature extractor have no padding, and linears never do.
"""

from itertools import pairwise

import torch
from torch.nn import functional as F

from ...core.affine import GELU_MIN, qmax
from ...core.histogram import Histogram
from ...model.layers import Encoder, Layer
from ...simulation.observers import Observer

_CANDIDATES = 192
# Points inside of a bin: it may be as wide as a step.
_POINTS = 4


def behind_gelu(encoders: list[Encoder], layers: list[Layer]) -> set[str]:
    """Layers whose input is the output of a GELU.

    Arguments
    ---------
    encoders : list of Encoder
        The encoders.
    layers : list of Layer
        All layers.

    Returns
    -------
    set of str
        Names.
    """
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
    """Collects histograms of ``input - GELU_MIN``, which is not negative:
    so a histogram of magnitudes keeps the sign."""

    def _collect(
        self, histogram: Histogram, x: torch.Tensor, time_axis: int
    ) -> None:
        super()._collect(histogram, x.float() - GELU_MIN, time_axis)


def lopsided_range(
    shifted: Histogram,
    bits: int,
    upper: float,
    search: bool = True,
) -> tuple[float, float]:
    """Range and offset for an input behind a GELU.

    Arguments
    ---------
    shifted : Histogram
        Of ``input - GELU_MIN``.
    bits : int
        Of the activations.
    upper : float
        Largest input that is represented.
    search : bool
        Whether a smaller upper end may be taken, by least squared error.

    Returns
    -------
    float
        amax: half of the range.
    float
        The offset, a whole number of steps.

    Example
    -------
    >>> shifted = Histogram()
    >>> x = F.gelu(torch.linspace(-4, 4, 10001))
    >>> shifted.add(x - GELU_MIN)
    >>> amax, offset = lopsided_range(shifted, 6, 4.0, search=False)
    >>> round(offset - amax, 2), round(offset + amax, 2)
    (-0.2, 4.0)
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
                # The upper end stays where it was asked for.
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
    """Values of the input, limited to the upper end, and their counts."""
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
