"""The geometry of a layer: what decides which kernel computes it."""

from dataclasses import dataclass
from typing import Any

from ..core.encoder_spec import AnyLayer, EncoderSpec
from ..core.integer_layer import IntegerLayer


@dataclass(frozen=True)
class Geometry:
    """What decides which kernel a layer is computed with.

    Arguments
    ---------
    place : str
        ``"first"`` and ``"front"`` convolution of the feature extractor,
        ``"position"``, ``"linear"``; ``"head"`` outside of the encoder.
    then : str
        What the result goes into: ``"gelu"``, ``"sum"`` with the residual
        stream, ``"shared"`` for products of one input, or nothing.
    shape : tuple of int
        Of the weight.
    stride, padding, dilation, groups : int
        Of a convolution.
    bias : bool
        Whether there is one.
    weight_bits, activation_bits : int
        0 for a layer that stays float.
    offset : bool
        Whether the zero point of its input is another than 0.
    """

    place: str
    then: str
    shape: tuple[int, ...]
    stride: int
    padding: int
    dilation: int
    groups: int
    bias: bool
    weight_bits: int = 0
    activation_bits: int = 0
    offset: bool = False

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
        """Input frames that make so many rows, in whole strides."""
        if not self.is_conv:
            return rows
        reach = self.dilation * (self.shape[2] - 1) + 1 - 2 * self.padding
        return (rows + -(-reach // self.stride) - 1) * self.stride


def geometry_of(layer: AnyLayer, place: str, then: str = "") -> Geometry:
    """The geometry of a layer.

    Arguments
    ---------
    layer : IntegerLayer or FloatLayer
        The layer that is executed.
    place, then : str
        As of :class:`Geometry`.

    Returns
    -------
    Geometry

    Example
    -------
    >>> layer = FloatLayer("w", "linear", torch.ones(4, 2), None)
    >>> print(geometry_of(layer, "head"))
    head 4x2 float no bias
    """
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
    """The geometries of an encoder.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder that is executed.

    Returns
    -------
    dict
        Geometry by name of the layer.
    """
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
