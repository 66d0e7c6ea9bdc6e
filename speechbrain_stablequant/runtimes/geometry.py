"""The geometry of a layer: what decides which kernel computes it."""

from dataclasses import dataclass

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
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    weight_bits: int = 0  # 0: float
    activation_bits: int = 0  # 0: float
    offset: bool = False  # whether the input's zero point is not 0

    def __str__(self) -> str:
        words = [self.place]
        if self.then:
            words.append(f"with {self.then}")
        words.append("x".join(map(str, self.shape)))
        for key in ("stride", "padding", "dilation", "groups"):
            if getattr(self, key) != getattr(Geometry, key):
                words.append(f"{key} {getattr(self, key)}")
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
    integer = isinstance(layer, IntegerLayer)
    return Geometry(
        place,
        then,
        tuple(layer.weight.shape),
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.weight_bits if integer else 0,
        layer.activation_bits if integer else 0,
        integer and bool(layer.zero_point()),
    )


def encoder_geometries(spec: EncoderSpec) -> dict[str, Geometry]:
    """Geometry by layer name of an encoder that is executed."""
    rows: list[tuple] = []
    for index, stage in enumerate(spec.convs):
        if not plain_windows(stage.conv):
            continue  # refused by the runtimes, in their own words
        at_once = stage.norm is None or stage.norm.over_time
        place = "front" if index else "first"
        rows.append((stage.conv, place, "gelu" if at_once else ""))
    rows.append((spec.projection, "linear"))
    rows.append((spec.pos_conv, "position"))
    for block in spec.blocks:
        for layer in (block.query, block.key, block.value):
            rows.append((layer, "linear", "shared"))
        rows.append((block.out, "linear", "sum"))
        rows.append((block.up, "linear", "gelu"))
        rows.append((block.down, "linear", "sum"))
    return {layer.name: geometry_of(layer, *row) for layer, *row in rows}


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
