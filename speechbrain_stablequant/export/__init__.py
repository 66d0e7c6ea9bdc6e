"""ONNX with QuantizeLinear/DequantizeLinear, for ONNX Runtime and others.

The graph is built from the description of an encoder
(:mod:`speechbrain_stablequant.core.encoder_spec`), not traced: weights stay
int8 in the file, batch and time are dynamic, and padding is masked inside.

A layer's input is clipped to ``[-amax, amax]``, which an offset of the
activations moves together with the zero point, and then quantized. Both ends
are values of the grid, so this equals the clamp after the rounding of
:mod:`speechbrain_stablequant.core.affine`, also for 8 bits, where
QuantizeLinear alone would go down to -128. ONNX divides by the scale where
`numerics` multiplies by its reciprocal: a value within float rounding of a
tie may fall to its other side, all others are the same integers.
"""

from ..runtimes.onnx_.graph import Graph, require_onnx
from ..runtimes.onnx_.head import Activation, describe_head
from ..runtimes.onnx_.model import export_onnx
from .onnx import export_folder

__all__ = [
    "Activation",
    "Graph",
    "describe_head",
    "export_folder",
    "export_onnx",
    "require_onnx",
]
