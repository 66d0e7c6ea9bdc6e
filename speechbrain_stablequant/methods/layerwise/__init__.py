"""Methods that decide the integers, layer by layer.

Each layer is solved behind the already quantized layers before it, from the
Hessian of its inputs: one short pass over the calibration set for any number
of iterations.
"""

from .adaround import AdaRound
from .gptq import Compensate
from .reconstruct import rounded_layers

__all__ = ["AdaRound", "Compensate", "rounded_layers"]
