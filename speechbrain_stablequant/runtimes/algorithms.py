"""The ways in which a runtime can compute one layer.

A kernel of a library can be wrong for one geometry on one CPU: oneDNN's AMX
kernels are for convolutions of few channels in a group. Then the same layer is
computed another way, in the same runtime.
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
    """How many groups of a convolution are put together to a wide one.

    Arguments
    ---------
    layer : IntegerLayer or FloatLayer
        A Conv1d.

    Returns
    -------
    int
        1 where they are wide already.
    """
    width = layer.weight.shape[1]
    for factor in range(1, layer.groups + 1):
        if layer.groups % factor == 0 and factor * width >= WIDE_GROUP:
            return factor
    return layer.groups


def join_groups(layer: AnyLayer) -> AnyLayer:
    """The same convolution with fewer, wider groups.

    Arguments
    ---------
    layer : IntegerLayer or FloatLayer
        A Conv1d.

    Returns
    -------
    IntegerLayer or FloatLayer

    Example
    -------
    >>> import torch
    >>> from speechbrain_stablequant.core.integer_layer import FloatLayer
    >>> conv = FloatLayer("w", "conv1d", torch.ones(4, 1, 1), None, groups=2)
    >>> join_groups(conv).weight[:, :, 0]
    tensor([[1., 0.],
            [1., 0.],
            [0., 1.],
            [0., 1.]])
    """
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
