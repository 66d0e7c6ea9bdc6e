"""What a layer takes in: unsigned bytes on a grid, or floats.

oneDNN's fast int8 kernels want unsigned activations. A signed integer q of
the plan is held as the byte q + 128; the kernels take the zero point back out
of their int32 sums, so nothing is lost. An activation offset moves the zero
point.
"""

import math
from dataclasses import dataclass

import torch

from ...core.affine import qmax
from ...core.integer_layer import FloatLayer, IntegerLayer
from ..algorithms import FLOAT

#: The byte that stands for the integer 0.
ZERO = 128

#: Quantizing goes through int32 without saturation. With a smaller scale, of
#: a layer that saw next to nothing in calibration, inputs are cut before.
_SAFE_SCALE = 1e-4


@dataclass(frozen=True)
class Grid:
    """The integers that a quantized layer takes in.

    Arguments
    ---------
    scale : float
        Of the plan; a float32.
    bits : int
        2 to 8.
    zero : int
        The byte that an input of 0 becomes.

    Example
    -------
    >>> Grid(0.5, 8).prepare(torch.tensor([[1.0, -1.0, 1e9]]))
    tensor([[130, 126, 255]], dtype=torch.uint8)
    """

    scale: float
    bits: int
    zero: int = ZERO

    dtype = torch.uint8

    def clip(
        self,
        q: torch.Tensor,
        out: torch.Tensor | None = None,
        least: float = -math.inf,
    ) -> torch.Tensor:
        """Cuts bytes to the narrow range: kernels fill all 256.

        Arguments
        ---------
        q : torch.Tensor
            uint8.
        out : torch.Tensor, optional
            Where to; in place by default.
        least : float
            Lower bound of what was quantized. If it is on the grid, all of
            the 8 bits that kernels fill are.

        Returns
        -------
        torch.Tensor
            uint8.
        """
        limit = qmax(self.bits)
        lowest = ZERO - limit
        if self.bits == 8 and least > (lowest - self.zero) * self.scale:
            return q if out is None else out.copy_(q)
        out = q if out is None else out
        return torch.clamp(q, lowest, ZERO + limit, out=out)

    def prepare(
        self, x: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Quantizes floats, as :func:`~speechbrain_stablequant.core.affine\
.quantize` does.

        Arguments
        ---------
        x : torch.Tensor
            Float.
        out : torch.Tensor, optional
            Where to.

        Returns
        -------
        torch.Tensor
            uint8.
        """
        x = x.float().contiguous()
        if self.scale < _SAFE_SCALE:
            edge = 2 * ZERO * self.scale
            x = x.clamp(-edge, edge)
        # The one vectorized conversion to bytes that torch has.
        wrapped = torch.quantize_per_tensor(
            x, self.scale, self.zero, torch.quint8
        )
        q = torch.empty(0, dtype=torch.uint8)
        q.set_(wrapped.untyped_storage(), 0, wrapped.shape, wrapped.stride())
        return self.clip(q, out)


@dataclass(frozen=True)
class Floats:
    """The floats that a layer without quantization takes in.

    Arguments
    ---------
    dtype : torch.dtype
        float32 or bfloat16.
    """

    dtype: torch.dtype

    def prepare(
        self, x: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Converts floats."""
        return x.to(self.dtype) if out is None else out.copy_(x)


Form = Grid | Floats


def form_of(layer: IntegerLayer | FloatLayer, dtype: torch.dtype) -> Form:
    """What a layer takes in.

    Arguments
    ---------
    layer : IntegerLayer or FloatLayer
        The layer.
    dtype : torch.dtype
        Of a layer that is not quantized, where its kernels are right.

    Returns
    -------
    Grid or Floats
    """
    if isinstance(layer, FloatLayer):
        return Floats(torch.float32 if layer.algorithm == FLOAT else dtype)
    return Grid(
        float(layer.activation_scale),
        layer.activation_bits,
        ZERO + layer.zero_point(),
    )
