"""Methods that decide the integers themselves, layer by layer.

Each layer is looked at behind the layers before it as they are already
quantized. What a method needs of the data is in the moments of the layer's
inputs, so that one short pass over the calibration set serves any number of
iterations.
"""

from .adaround import AdaRound
from .gptq import Compensate
from .prefix_walk import PrefixWalk
from .reconstruct import LayerStore, refine

__all__ = ["AdaRound", "Compensate", "LayerStore", "PrefixWalk", "refine"]
