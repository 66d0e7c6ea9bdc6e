"""A layer in the form that an algorithm multiplies."""

from dataclasses import replace

import torch

from ..core.integer_layer import AnyLayer, IntegerLayer
from .geometry import WIDE_GROUP, WINDOW, Geometry


def geometry_of(layer: AnyLayer, place: str, then: str = "") -> Geometry:
    """The geometry of a layer that is executed."""
    integer = isinstance(layer, IntegerLayer)
    return Geometry(
        place,
        then,
        tuple(layer.weight.shape),
        *(getattr(layer, key) for key in WINDOW),
        layer.bias is not None,
        layer.weight_bits if integer else 0,
        layer.activation_bits if integer else 0,
        integer and bool(layer.zero_point()),
    )


def plain_windows(conv: AnyLayer) -> bool:
    """Whether a convolution is a product with its windows alone."""
    return not conv.padding and conv.dilation == conv.groups == 1


def check_front(conv: AnyLayer) -> None:
    """Raise ValueError for a convolution that no front end computes."""
    if not plain_windows(conv):
        raise ValueError(
            f"{conv.name}: a feature extractor with padding, dilation or "
            "groups is not supported; use backend: torch"
        )


def join_groups(layer: AnyLayer) -> AnyLayer:
    """The same convolution with fewer, wider groups, zeros between them."""
    outputs, width, kernel = layer.weight.shape
    factor = 1
    while factor < layer.groups and (
        layer.groups % factor or factor * width < WIDE_GROUP
    ):
        factor += 1
    if factor == 1:
        return layer
    layer = layer.loaded()
    own = outputs // layer.groups
    weight = layer.weight.view(-1, factor, own, width, kernel)
    joined = weight.new_zeros(len(weight), factor, own, factor, width, kernel)
    for place in range(factor):
        joined[:, place, :, place] = weight[:, place]
    weight = joined.view(outputs, factor * width, kernel)
    return replace(layer, weight=weight, groups=layer.groups // factor)


def split_groups(layer: AnyLayer) -> list[AnyLayer]:
    """Each group of a convolution as one of its own; weights are views."""
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
