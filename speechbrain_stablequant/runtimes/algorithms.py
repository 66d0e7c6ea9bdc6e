"""The geometry of a layer, and the algorithms by which a runtime computes it.

A library kernel can be wrong for one geometry on one CPU, such as oneDNN's AMX
kernels for convolutions with few channels per group. Then the layer is computed
by another algorithm of the same runtime.
"""

from dataclasses import dataclass, replace

import torch

from ..core.integer_layer import AnyLayer, IntegerLayer

#: As the runtime usually computes it.
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


#: Of a layer and of its geometry.
WINDOW = ("stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Geometry:
    """What determines the kernel of a layer."""

    # "first" or "front" convolution of the feature extractor, "position",
    # "linear", or "head" outside of the encoder
    place: str
    # "gelu", "sum" with the residual stream, "shared" input of several
    # products, or nothing
    then: str
    shape: tuple[int, ...]  # of the weight
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    weight_bits: int = 0  # 0: float
    activation_bits: int = 0  # 0: float
    offset: bool = False  # whether the input's zero point is not 0

    def __str__(self) -> str:
        bits = f"W{self.weight_bits}A{self.activation_bits}"
        words = [
            self.place,
            f"with {self.then}" if self.then else "",
            "x".join(map(str, self.shape)),
            *(
                f"{key} {getattr(self, key)}"
                for key in WINDOW
                if getattr(self, key) != getattr(Geometry, key)
            ),
            bits if self.weight_bits else "float",
            "offset" if self.offset else "",
            "" if self.bias else "no bias",
        ]
        return " ".join(filter(None, words))

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution."""
        return len(self.shape) == 3

    @property
    def has_narrow_groups(self) -> bool:
        """Whether it is a convolution with groups below ``WIDE_GROUP``."""
        return self.groups > 1 and self.shape[1] < WIDE_GROUP

    def inputs(self, rows: int) -> int:
        """Input frames that give ``rows`` output frames, in whole strides."""
        if not self.is_conv:
            return rows
        reach = self.dilation * (self.shape[2] - 1) + 1 - 2 * self.padding
        return (rows + -(-reach // self.stride) - 1) * self.stride


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
