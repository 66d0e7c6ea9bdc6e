"""The form of a layer's input: unsigned bytes on a grid, or floats.

oneDNN's fast int8 kernels take unsigned activations. A signed integer q of the
plan is held as the byte q + 128; the kernels subtract the zero point from their
int32 sums exactly. A layer's own zero point is added.
"""

import math
import warnings
from dataclasses import dataclass

import torch

from ...core.affine import qmax
from ...core.integer_layer import AnyLayer, FloatLayer
from ..geometry import FLOAT

#: The byte that stands for the integer 0.
ZERO = 128

# Deprecated in torch 2.14; who uses this package can do nothing about it.
warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)

#: torch quantizes through int32 without saturation. With a smaller scale (a
#: layer with almost no input in calibration) inputs are clipped before.
_SAFE_SCALE = 1e-4


@dataclass(frozen=True)
class Grid:
    """The integers that a quantized layer takes."""

    scale: float  # of the plan; a float32
    bits: int  # 2 to 8
    zero: int = ZERO  # the byte of an input of 0

    dtype = torch.uint8

    def edges(self) -> tuple[float, float]:
        """The least and the largest float."""
        limit = qmax(self.bits)
        ends = ZERO - limit, ZERO + limit
        return tuple((end - self.zero) * self.scale for end in ends)

    def clip(
        self,
        q: torch.Tensor,
        out: torch.Tensor | None = None,
        least: float = -math.inf,
    ) -> torch.Tensor:
        """Clip bytes to the narrow range, in place by default: kernels may
        produce all 256 values. If ``least``, a lower bound of the float
        values, is inside the grid, 8-bit results need no clipping."""
        limit, out = qmax(self.bits), q if out is None else out
        lowest = ZERO - limit
        if self.bits == 8 and least > (lowest - self.zero) * self.scale:
            return q if out is q else out.copy_(q)
        return torch.clamp(q, lowest, ZERO + limit, out=out)

    def prepare(
        self, x: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Quantize floats as
        :func:`~speechbrain_stablequant.core.affine.quantize` does, to uint8."""
        x = x.float().contiguous()
        if not hasattr(torch, "quantize_per_tensor"):
            return self._prepare_plainly(x, out)
        if self.scale < _SAFE_SCALE:
            edge = 2 * ZERO * self.scale
            x = x.clamp(-edge, edge)
        # torch's only vectorized conversion to bytes.
        wrapped = torch.quantize_per_tensor(
            x, self.scale, self.zero, torch.quint8
        )
        q = torch.empty(0, dtype=torch.uint8)
        q.set_(wrapped.untyped_storage(), 0, wrapped.shape, wrapped.stride())
        return self.clip(q, out)

    def _prepare_plainly(
        self, x: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        """As :meth:`prepare`, in two to four times its time: for a torch that
        has dropped what it deprecates."""
        limit, inverse = qmax(self.bits), 1.0 / torch.tensor(self.scale)
        q = (x * inverse).round_().add_(self.zero - ZERO)
        q = q.clamp_(-limit, limit).to(torch.int8).view(torch.uint8)
        return torch.bitwise_xor(q, ZERO, out=out)


@dataclass(frozen=True)
class Floats:
    """The floats that an unquantized layer takes."""

    dtype: torch.dtype  # float32 or bfloat16

    scale, zero = 1.0, 0

    def clip(
        self, x: torch.Tensor, out: torch.Tensor | None, least: float
    ) -> torch.Tensor:
        """Floats need no clipping."""
        return x if out is None else out.copy_(x)

    def prepare(
        self, x: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Convert floats."""
        return x.to(self.dtype) if out is None else out.copy_(x)


Form = Grid | Floats


def form_of(layer: AnyLayer, dtype: torch.dtype) -> Form:
    """The form of a layer's input; ``dtype`` for one that is not quantized."""
    if isinstance(layer, FloatLayer):
        return Floats(torch.float32 if layer.algorithm == FLOAT else dtype)
    return Grid(
        float(layer.activation_scale),
        layer.activation_bits,
        ZERO + layer.zero_point(),
    )
