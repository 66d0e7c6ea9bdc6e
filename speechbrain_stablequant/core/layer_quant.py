"""How one layer is quantized: bits and ranges, or tensors that were decided."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .affine import FLOAT_BITS, scale_from_amax


@dataclass(frozen=True)
class LayerQuant:
    weight_bits: int  # one scale per output channel
    # Of the input, one static scale; FLOAT_BITS: the input stays float.
    activation_bits: int
    activation_amax: float  # largest magnitude of the input in the range
    weight_method: str = "max"  # or "mse": the search of the weight's ranges
    # Subtracted from the input before quantization, so that an asymmetric
    # input uses all integers; a whole number of steps.
    activation_offset: float = 0.0

    @property
    def weight_only(self) -> bool:
        """Whether the weight alone is quantized."""
        return self.activation_bits == FLOAT_BITS

    @property
    def largest(self) -> float:
        """The largest input in the range."""
        return self.activation_amax + self.activation_offset

    def with_float_input(self) -> "LayerQuant":
        """The same weights; the input is not quantized."""
        return LayerQuant(self.weight_bits, FLOAT_BITS, 0.0, self.weight_method)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; without a zero offset, as files and keys had it."""
        raw = asdict(self)
        if not self.activation_offset:
            del raw["activation_offset"]
        return raw

    def input_scale(self, device: str | torch.device = "cpu") -> torch.Tensor:
        if self.weight_only:
            return torch.ones((), device=device)
        amax = torch.tensor(self.activation_amax)
        return scale_from_amax(amax, self.activation_bits).to(device)


def quants_json(quants: Mapping[str, LayerQuant]) -> dict[str, dict]:
    """Layers' quants as JSON, by name."""
    return {name: quant.to_dict() for name, quant in quants.items()}


@dataclass(frozen=True)
class LayerTensors:
    """Tensors of one quantized layer; None where the plan's numbers decide.

    ``weight`` is int8 and comes with its float32 ``weight_scale`` [out];
    ``bias`` is float32 [out].
    """

    weight: torch.Tensor | None = field(default=None, repr=False)
    weight_scale: torch.Tensor | None = field(default=None, repr=False)
    bias: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.weight is None) != (self.weight_scale is None):
            raise ValueError("integers and their scales belong together")

    def named(self) -> dict[str, torch.Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}

    def cpu(self) -> "LayerTensors":
        return LayerTensors(**{n: x.cpu() for n, x in self.named().items()})
