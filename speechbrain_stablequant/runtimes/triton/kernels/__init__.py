"""Operators of a W8A8 encoder, for CUDA in Triton.

Each operator is declared once, as ``torch.ops.stablequant.<name>``: what it
computes is its plain-torch reference, which runs wherever no kernel does; on
CUDA a Triton kernel computes it. One file holds one family:

- ``quantize``: a float tensor to int8, after a GELU if asked;
- ``layer_norm``: LayerNorm to int8, to 16 bit or to both;
- ``matmul``: a linear layer, and a strided convolution as implicit product;
- ``attention``: over the real frames of each utterance;
- ``wave_conv``: the first convolution, from the waveform;
- ``wave_gram``: what a GroupNorm behind it needs;
- ``group_conv``: the positional convolution.

Activations are channels-last ([batch, time, channels]), weights have their
reduction innermost ([out, in]), sums are int32 and never leave the registers.
The operators know tensors only, not layers or plans. ``trial`` compares all of
them with their references, once on each card. With ``TRITON_INTERPRET=1`` in
the environment the kernels run on CPU in Triton's interpreter.
"""

from . import (
    attention,
    group_conv,
    layer_norm,
    matmul,
    quantize,
    wave_conv,
    wave_gram,
)

__all__ = [
    "attention",
    "group_conv",
    "layer_norm",
    "matmul",
    "quantize",
    "wave_conv",
    "wave_gram",
]
