"""The geometry of a layer, and the algorithms by which a runtime computes it.

A library kernel can be wrong for one geometry on one CPU, such as oneDNN's AMX
kernels for convolutions with few channels per group. Then the layer is computed
by another algorithm of the same runtime.
"""

from dataclasses import dataclass

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
