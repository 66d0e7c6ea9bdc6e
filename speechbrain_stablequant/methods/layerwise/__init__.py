"""Methods that decide the integers, layer by layer.

Each layer is solved after the layers before it are quantized, from the Hessian
of its inputs. This takes one short pass over the calibration set, however many
iterations follow.
"""

from .adaround import AdaRound
from .gptq import Compensate
from .reconstruct import rounded_layers

__all__ = ["AdaRound", "Compensate", "rounded_layers"]
