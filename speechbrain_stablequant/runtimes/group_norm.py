"""The GroupNorm after base models' first convolution, as a gain and a shift.

It normalizes each channel over time. That convolution has one input channel, so
mean and variance of its outputs follow from its short window: mean = w . m and
variance = w' C w, with the window's mean m and covariance C. The normalization
becomes a gain and a shift per channel, known before the convolution runs, and
padding to a longer input does not affect it.
"""

import torch

from ..core.affine import dequantize, quantize
from ..core.encoder_spec import ConvSpec
from ..core.integer_layer import FloatLayer


def gain_and_shift(
    stage: ConvSpec, wavs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gain`` and ``shift``, float32 [batch, channels], of a norm over
    time: its output is ``conv(wavs) * gain + shift``. ``wavs``: float32
    [batch, samples], all that the norm sees."""
    conv, norm = stage.conv, stage.norm
    if conv.weight.shape[1] != 1 or conv.padding or conv.dilation != 1:
        raise ValueError(
            f"{conv.name}: GroupNorm is supported after a convolution of one "
            "channel without padding; use backend: torch"
        )
    if isinstance(conv, FloatLayer):
        x, weight = wavs, conv.weight
    else:
        scale = conv.activation_scale
        x = dequantize(quantize(wavs, scale, conv.activation_bits), scale)
        weight = conv.float_weight()
    weight = weight[:, 0].double()
    windows = x.double().unfold(1, weight.shape[1], conv.stride)
    mean = windows.mean(1)
    covariance = windows.transpose(1, 2) @ windows / windows.shape[1]
    covariance -= mean[:, :, None] * mean[:, None, :]
    variance = torch.einsum("ck,bkl,cl->bc", weight, covariance, weight)
    gain = norm.weight.double() / (variance.clamp_(min=0) + norm.eps).sqrt()
    offset = mean @ weight.T
    if conv.bias is not None:
        offset = offset + conv.bias.double()
    return gain.float(), (norm.bias.double() - offset * gain).float()
