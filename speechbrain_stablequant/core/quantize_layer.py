"""Quantizes a layer as a plan says."""

from ..model.layer import Layer
from .affine import quantize, weight_scale
from .integer_layer import (
    IntegerLayer,
    check_offset,
    float_layer,
    layer_geometry,
)
from .layer_quant import LayerQuant, LayerTensors


def integer_layer(
    layer: Layer, quant: LayerQuant, tensors: LayerTensors | None = None
) -> IntegerLayer:
    """Quantizes a layer; ``tensors`` replace nearest integers and bias."""
    own = float_layer(layer.name, layer.module)
    tensors = tensors or LayerTensors()
    weight, scale = tensors.weight, tensors.weight_scale
    if weight is None:
        scale = weight_scale(own.weight, quant.weight_bits, quant.weight_method)
        weight = quantize(own.weight, scale, quant.weight_bits)
    if quant.activation_offset:
        check_offset(layer.module)
    bias = own.bias if tensors.bias is None else tensors.bias
    device = own.weight.device
    return IntegerLayer(
        name=own.name,
        kind=own.kind,
        weight=weight.to(device),
        weight_scale=scale.to(device),
        weight_bits=quant.weight_bits,
        activation_scale=quant.input_scale(device),
        activation_bits=quant.activation_bits,
        bias=None if bias is None else bias.float().to(device),
        activation_offset=quant.activation_offset,
        **layer_geometry(layer.module),
    )
