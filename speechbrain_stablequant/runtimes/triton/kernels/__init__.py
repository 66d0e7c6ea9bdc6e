"""Operators of a W8A8 encoder, for CUDA in Triton.

Each operator is ``torch.ops.stablequant.<name>``. Its plain-torch reference
defines what it computes and runs wherever no kernel does; on CUDA a Triton
kernel computes it. One file per operator family:

- ``quantize``: a float tensor to int8, after a GELU if asked;
- ``layer_norm``: LayerNorm to int8, to 16 bit or to both;
- ``matmul``: a linear layer and a strided convolution;
- ``attention``: over the real frames of each utterance;
- ``wave_conv``: the first convolution, from the waveform, and the statistics
  that a GroupNorm after it needs;
- ``group_conv``: the positional convolution.

Activations are channels-last ([batch, time, channels]), weights have their
reduction innermost ([out, in]), and int32 sums never leave the registers.
Arguments that operators share:

- ``scale``: float32 [out], input scale times weight scale; ``bias``: float32
  [out] or None;
- ``norm_weight``, ``norm_bias``, ``eps``: LayerNorm over the channels, float32
  [out]; both None for no norm;
- ``gelu``: whether GELU is applied, after the norm;
- ``residual``: float, the shape of the result, added after the GELU; or None;
- ``dtype``: of the result. int8 means quantized, to
  ``clamp(round(y * inverse + zero), -limit, limit)``, where ``inverse`` is
  1 / scale and ``zero`` the zero point.

``tiles`` and ``tuning`` choose the tile of a launch. ``trial`` compares every
operator with its reference, once per card. With ``TRITON_INTERPRET=1`` in the
environment the kernels run on CPU in Triton's interpreter.
"""

from . import (  # noqa: F401
    attention,
    group_conv,
    layer_norm,
    matmul,
    quantize,
    wave_conv,
)
