"""The algorithms by which a runtime can compute one layer.

A library kernel can be wrong for one geometry on one CPU, such as oneDNN's AMX
kernels for convolutions with few channels per group. Then the layer is computed
by another algorithm of the same runtime.
"""

from dataclasses import replace

import torch

from ..core.encoder_spec import AnyLayer
from ..core.integer_layer import IntegerLayer
from .geometry import Geometry

#: As the runtime computes it everywhere else.
NATIVE = "native"
#: A grouped convolution with several groups in one, zeros between them.
JOINED_GROUPS = "joined groups"
#: A convolution as a product with its windows.
WINDOW_PRODUCT = "product of windows"
#: A convolution of the library where the runtime multiplies windows.
CONVOLUTION = "convolution"
#: The integers of the plan, multiplied as floats.
FLOAT = "float"

#: Channels of a group from which on the kernels of all CPUs are right.
WIDE_GROUP = 32


def narrow_groups(geometry: Geometry) -> bool:
    """Whether a convolution has several groups below ``WIDE_GROUP``."""
    return geometry.groups > 1 and geometry.shape[1] < WIDE_GROUP


def join_groups(layer: AnyLayer) -> AnyLayer:
    """The same convolution with fewer, wider groups, zeros between them."""
    outputs, width, kernel = layer.weight.shape
    factor = next(
        (
            count
            for count in range(1, layer.groups)
            if layer.groups % count == 0 and count * width >= WIDE_GROUP
        ),
        layer.groups,
    )
    if factor == 1:
        return layer
    layer = layer.loaded()
    own = outputs // layer.groups
    weight = layer.weight.view(-1, factor, own, width, kernel)
    joined = weight.new_zeros(len(weight), factor, own, factor, width, kernel)
    for place in range(factor):
        joined[:, place, :, place] = weight[:, place]
    return replace(
        layer,
        weight=joined.view(outputs, factor * width, kernel),
        groups=layer.groups // factor,
    )


def split_groups(layer: AnyLayer) -> list[AnyLayer]:
    """Each group of a convolution as one of its own, with views of the
    weight."""
    size = layer.weight.shape[0] // layer.groups
    parts = []
    for start in range(0, layer.weight.shape[0], size):
        own = slice(start, start + size)
        bias = None if layer.bias is None else layer.bias[own]
        part = replace(layer, weight=layer.weight[own], bias=bias, groups=1)
        if isinstance(layer, IntegerLayer):
            part = replace(part, weight_scale=layer.weight_scale[own])
        parts.append(part)
    return parts


def window_rows(weight: torch.Tensor) -> torch.Tensor:
    """A convolution's weight [out, in, kernel] as rows [out, kernel * in], to
    multiply windows whose frames lie one after the other."""
    return weight.transpose(1, 2).flatten(1)
