"""The algorithms by which a runtime can compute one layer.

A library kernel can be wrong for one geometry on one CPU, such as oneDNN's AMX
kernels for convolutions with few channels per group. Then the layer is computed
by another algorithm of the same runtime.
"""

from dataclasses import replace

from ..core.encoder_spec import AnyLayer

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


def joined_factor(layer: AnyLayer) -> int:
    """How many groups of a Conv1d are joined into a wide one."""
    width = layer.weight.shape[1]
    for factor in range(1, layer.groups + 1):
        if layer.groups % factor == 0 and factor * width >= WIDE_GROUP:
            return factor
    return layer.groups


def join_groups(layer: AnyLayer) -> AnyLayer:
    """The same convolution with fewer, wider groups, zeros between them."""
    factor = joined_factor(layer)
    if factor == 1:
        return layer
    layer = layer.loaded()
    outputs, width, kernel = layer.weight.shape
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
