"""The triton runtime: int8 kernels on CUDA, the rest in 16 bit.

Supports the wav2vec 2.0 and HuBERT encoders that `describe_encoder` describes,
with any of their layers in floating point. A layer that no kernel computes,
such as a first convolution of more than 128 taps, is refused by name. The
operators are in ``kernels``.
"""

import os
from dataclasses import dataclass
from typing import Literal

from ...utils.typed import count
from ..base import Runtime


@dataclass(frozen=True)
class TritonOptions:
    """``backend: triton``.

    Arguments
    ---------
    device : str or None
        Where it runs; None for the device that the model is on.
    dtype : str
        Of the residual stream and of the attention: ``float16``,
        ``bfloat16``, ``float32``, or ``auto``, which is float16 if the stream
        stayed far below its largest value while calibrating, else bfloat16.
    max_graphs : int
        CUDA graphs to keep, one for each (batch, length) bucket; 0 for none.
        The default holds all lengths up to 40 s at one batch size.
    max_graph_mb : int
        Memory of these graphs, in MB; what needs more runs without one.
    tune : bool
        Whether tiles are measured when a shape is first met.
    cache : str or None
        JSON file of measured tiles; None for one of each card in the user's
        cache folder.
    """

    device: str | None = None
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    max_graphs: int = count(48, 0)
    max_graph_mb: int = count(8192, 0)
    tune: bool = True
    cache: str | None = None


RUNTIME = Runtime(
    TritonOptions,
    encoder="triton.build:make_executor",
    layer="triton.build:make_layer",
    why_not="triton.build:why_not",
    device=None if os.environ.get("TRITON_INTERPRET") else "cuda",
    needs=("triton",),
    install="triton",
)
