"""The range of each layer's input below a clipping percentile."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...core.affine import GELU_MIN
from ...core.calibrators import clipped_mse
from ...core.layer_quant import LayerQuant
from .zero_point import asymmetric_range

if TYPE_CHECKING:
    from ...model.layers import Layer
    from .work import FloatModel, Work

#: Of a unit that stays float.
FLOAT_BITS = 16


def layer_quant(
    work: "Work",
    model: "FloatModel",
    layer: "Layer",
    percentile: float,
    bits: int | None = None,
    least_error: bool = True,
) -> LayerQuant:
    """Scales below a percentile: of least squared error, or the whole range.

    StableQuant's search tries the whole range. ``bits``: of a mixed precision.
    """
    config, ratio = work.session.config, percentile / 100
    activation_bits = max(bits or 0, config.activation_bits)
    zero_point, shifted = 0.0, model.shifted.get(layer.name)
    if shifted is not None:
        upper = shifted.quantile(ratio) + GELU_MIN
        amax, zero_point = asymmetric_range(
            shifted, activation_bits, upper, least_error
        )
    else:
        histogram = model.histograms[layer.name]
        amax = histogram.quantile(ratio)
        if least_error:
            amax = clipped_mse(histogram, amax, activation_bits)
    return LayerQuant(
        bits or config.weight_bits,
        activation_bits,
        float(amax),
        (config.weight_method or "mse") if least_error else "max",
        float(zero_point),
    )


def layer_quants(
    work: "Work",
    model: "FloatModel",
    percentiles: Mapping[str, float],
    bits: Mapping[str, int],
) -> dict[str, LayerQuant]:
    """All quantized layers; no clipping and the block's bits by default."""
    return {
        layer.name: layer_quant(
            work,
            model,
            layer,
            percentiles.get(layer.name, 100.0),
            bits.get(layer.unit),
        )
        for layer in work.session.layers
        if layer.name not in work.float_layers
        and bits.get(layer.unit) != FLOAT_BITS
    }
