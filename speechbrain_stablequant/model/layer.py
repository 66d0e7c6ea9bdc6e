"""A layer: a weight and its input, whatever module holds them."""

from dataclasses import dataclass, field

from torch import nn

HEAD = "head"

#: Kinds of layers by the class of their module.
KINDS = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d"}


@dataclass(frozen=True)
class Layer:
    name: str  # path in the Brain's modules' state dict
    module: nn.Module = field(repr=False)  # the Linear or convolution
    kind: str  # "linear", "conv1d" or "conv2d"
    unit: str  # name of its unit
    # Modules that call it only inside of products.visible.
    owners: tuple[nn.Module, ...] = field(default=(), repr=False)

    @property
    def least_bits(self) -> int:
        """Least width of its weights: 8 if an embedding looks up their rows."""
        return 8 if getattr(self.module, "tied", False) else 0

    @property
    def numel(self) -> int:
        return self.module.weight.numel()


@dataclass(frozen=True)
class Cut:
    """A place where one module's output determines everything after it."""

    unit: str  # first unit after the place
    module: nn.Module = field(repr=False)  # its output is kept
    # modules before it whose results are then not needed
    skip: tuple[nn.Module, ...] = field(repr=False, default=())


def pads_otherwise(module: nn.Module) -> bool:
    """Whether a layer pads by a mode or a word: it has no integer form."""
    mode = getattr(module, "padding_mode", "zeros")
    return mode != "zeros" or isinstance(getattr(module, "padding", 0), str)


def layer_kind(module: nn.Module) -> str | None:
    """By base class: a convolution with a weight norm has its own class."""
    return next((v for k, v in KINDS.items() if isinstance(module, k)), None)
