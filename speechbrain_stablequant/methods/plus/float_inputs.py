"""Inputs that stay float: those of few layers cause most of the divergence.

Some layers, mostly behind the GELU of one feed-forward block, see a few
activations hundreds of times as large as the rest (Sun et al., "Massive
Activations in Large Language Models", 2024). One scale has no room for both.
Their weights are quantized as all others are.
"""

import logging
import math
from collections.abc import Sequence

from ...model.layers import Layer
from .work import InputHarm, Work

logger = logging.getLogger(__name__)

# Below this share of the divergence a float input is not worth its products.
_LEAST_SHARE = 0.02


def choose_float_inputs(work: Work, harms: Sequence[InputHarm]) -> None:
    """Leaves float the inputs of most divergence for each multiply-add, up to
    ``plus.float_inputs`` of the multiply-adds."""
    products = _products(work)
    room = work.session.config.plus.float_inputs * sum(products.values())
    whole = sum(harm.divergence for harm in harms)

    def cost(harm: InputHarm) -> float:
        return sum(products[layer.name] for layer in harm.layers)

    harmful = [x for x in harms if x.divergence >= _LEAST_SHARE * whole > 0]
    shares: dict[str, float] = {}
    for harm in sorted(harmful, key=lambda x: cost(x) / x.divergence):
        if cost(harm) <= room:
            room -= cost(harm)
            share = 1.0 if whole == math.inf else harm.divergence / whole
            reason = (
                "its input stays float: quantized, it causes "
                f"{100 * share:.0f} % of the divergence of all layers"
            )
            for layer in harm.layers:
                shares[layer.name] = share
                work.float_inputs[layer.name] = reason
                logger.info("quantize: %s: %s", layer.name, reason)
    if shares:
        work.measured.append({"part": "float inputs", "layers": shares})


def _products(work: Work) -> dict[str, float]:
    """Multiply-adds of each layer over the calibration set."""
    histograms = work.calibration.histograms
    return {
        layer.name: histograms[layer.name].count * _uses(layer)
        for layer in work.session.layers
    }


def _uses(layer: Layer) -> float:
    """How often a layer multiplies each number of its input."""
    weight = layer.module.weight
    groups = getattr(layer.module, "groups", 1)
    stride = getattr(layer.module, "stride", (1,))
    return weight.numel() / (weight.shape[1] * groups) / math.prod(stride)
