"""The range of each layer's input below a clipping percentile."""

from collections.abc import Mapping

from ...core.affine import GELU_MIN
from ...core.calibrators import clipped_mse
from ...core.plan import LayerQuant
from ...model.layers import Layer
from .work import FloatModel, Work
from .zero_point import asymmetric_range

#: Of a unit that stays float.
FLOAT_BITS = 16


def least_error_quant(
    work: Work,
    layer: Layer,
    model: FloatModel,
    percentile: float,
    bits: int | None = None,
) -> LayerQuant:
    """Scales of least squared error below a clipping percentile."""
    config = work.session.config
    weight_bits = bits or config.weight_bits
    activation_bits = config.activation_bits
    if bits is not None:
        activation_bits = max(bits, activation_bits)
    ratio, zero_point = percentile / 100, 0.0
    if layer.name in model.shifted:
        shifted = model.shifted[layer.name]
        upper = shifted.quantile(ratio) + GELU_MIN
        amax, zero_point = asymmetric_range(shifted, activation_bits, upper)
    else:
        histogram = model.histograms[layer.name]
        edge = histogram.quantile(ratio)
        amax = clipped_mse(histogram, edge, activation_bits)
    return LayerQuant(
        weight_bits,
        activation_bits,
        float(amax),
        config.weight_method or "mse",
        float(zero_point),
    )


def full_range_quant(
    work: Work, model: FloatModel, layer: Layer, percentile: float
) -> LayerQuant:
    """The whole range below a percentile, as StableQuant's search tries it."""
    config, ratio, zero_point = work.session.config, percentile / 100, 0.0
    if layer.name in model.shifted:
        shifted = model.shifted[layer.name]
        amax, zero_point = asymmetric_range(
            shifted,
            config.activation_bits,
            shifted.quantile(ratio) + GELU_MIN,
            search=False,
        )
    else:
        amax = model.histograms[layer.name].quantile(ratio)
    return LayerQuant(
        config.weight_bits,
        config.activation_bits,
        float(amax),
        "max",
        float(zero_point),
    )


def least_error_quants(
    work: Work,
    model: FloatModel,
    percentiles: Mapping[str, float],
    bits: Mapping[str, int],
) -> dict[str, LayerQuant]:
    """All quantized layers; no clipping and the block's bits by default."""
    return {
        layer.name: least_error_quant(
            work,
            layer,
            model,
            percentiles.get(layer.name, 100.0),
            bits.get(layer.unit),
        )
        for layer in work.session.layers
        if layer.name not in work.float_layers
        and bits.get(layer.unit) != FLOAT_BITS
    }
