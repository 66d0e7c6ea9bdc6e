"""The geometry of a layer: what decides which kernel computes it."""

from dataclasses import dataclass
from typing import Any

from ..core.encoder_spec import AnyLayer, EncoderSpec
from ..core.integer_layer import IntegerLayer


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
    stride: int
    padding: int
    dilation: int
    groups: int
    bias: bool
    weight_bits: int = 0  # 0: float
    activation_bits: int = 0  # 0: float
    offset: bool = False  # whether the input's zero point is not 0

    def __str__(self) -> str:
        words = [self.place]
        if self.then:
            words.append(f"with {self.then}")
        words.append("x".join(map(str, self.shape)))
        for key, usual in (
            ("stride", 1),
            ("padding", 0),
            ("dilation", 1),
            ("groups", 1),
        ):
            value = getattr(self, key)
            if value != usual:
                words.append(f"{key} {value}")
        if self.weight_bits:
            words.append(f"W{self.weight_bits}A{self.activation_bits}")
        else:
            words.append("float")
        if self.offset:
            words.append("offset")
        if not self.bias:
            words.append("no bias")
        return " ".join(words)

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution."""
        return len(self.shape) == 3

    def inputs(self, rows: int) -> int:
        """Input frames that give ``rows`` output frames, in whole strides."""
        if not self.is_conv:
            return rows
        reach = self.dilation * (self.shape[2] - 1) + 1 - 2 * self.padding
        return (rows + -(-reach // self.stride) - 1) * self.stride


def geometry_of(layer: AnyLayer, place: str, then: str = "") -> Geometry:
    """The geometry of a layer that is executed."""
    bits: dict[str, Any] = {}
    if isinstance(layer, IntegerLayer):
        bits = {
            "weight_bits": layer.weight_bits,
            "activation_bits": layer.activation_bits,
            "offset": bool(layer.zero_point()),
        }
    return Geometry(
        place,
        then,
        tuple(layer.weight.shape),
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        **bits,
    )


def encoder_geometries(spec: EncoderSpec) -> dict[str, Geometry]:
    """Geometry by layer name of an encoder that is executed."""
    found = {}

    def add(layer: AnyLayer, place: str, then: str = "") -> None:
        found[layer.name] = geometry_of(layer, place, then)

    for index, stage in enumerate(spec.convs):
        conv = stage.conv
        if conv.padding or conv.dilation != 1 or conv.groups != 1:
            continue  # refused by the runtimes, in their own words
        at_once = stage.norm is None or stage.norm.over_time
        place = "front" if index else "first"
        add(stage.conv, place, "gelu" if at_once else "")
    add(spec.projection, "linear")
    add(spec.pos_conv, "position")
    for block in spec.blocks:
        for layer in (block.query, block.key, block.value):
            add(layer, "linear", "shared")
        add(block.out, "linear", "sum")
        add(block.up, "linear", "gelu")
        add(block.down, "linear", "sum")
    return found
