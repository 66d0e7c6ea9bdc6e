"""An encoder on the operators of ``kernels``.

The host decides by shapes only: numbers of real frames come in tensors, so that
one CUDA graph serves every input of a shape.
"""

import math

import torch

from ...core.encoder_spec import BlockSpec, EncoderSpec, Norm
from ...model.encoders import conv_samples
from .forms import OPS, Form, Place, input_form, move_norm, normalize
from .layers import ConvStage, Linear, PositionalConv, Projections


def count_frames(
    samples: torch.Tensor, stages: list[ConvStage]
) -> torch.Tensor:
    """Number of frames after all stages; less than 1 if the samples are too
    few. Rounding down once equals rounding down after each stage."""
    geometry = [(stage.kernel, stage.stride) for stage in stages]
    stride = math.prod(stage.stride for stage in stages)
    return (samples - conv_samples(1, geometry)) // stride + 1


class Block:
    """A transformer block."""

    def __init__(self, spec: BlockSpec, num_heads: int, place: Place):
        self.qkv = Projections((spec.query, spec.key, spec.value), place)
        self.out = Linear((spec.out,), place)
        self.up = Linear((spec.up,), place)
        self.down = Linear((spec.down,), place)
        self.norm1 = move_norm(spec.norm1, place.device)
        self.norm2 = move_norm(spec.norm2, place.device)
        self.num_heads = num_heads

    def attend(
        self, y: torch.Tensor, x: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """``x + out(attention(y))``, with ``y`` in ``self.qkv.form``."""
        form = self.out.form
        attended = OPS.attention(
            self.qkv(y), self.num_heads, real, *form.arguments()
        )
        return self.out(attended, residual=x)

    def feed(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``x + down(gelu(up(y)))``, with ``y`` in ``self.up.form``."""
        return self.down(self.up(y, self.down.form, gelu=True), residual=x)


def _norm_both(
    norm: Norm, x: torch.Tensor, form: Form, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm both in ``dtype`` and in ``form``."""
    if not form.quantized:
        y = normalize(norm, x, Form(dtype))
        return y, y
    return OPS.layer_norm_both(
        x, norm.weight, norm.bias, norm.eps, dtype, *form.arguments()[1:]
    )


class Network:
    """The whole encoder; ``dtype`` is that of residual stream and attention."""

    def __init__(self, spec: EncoderSpec, place: Place):
        device, dtype = place
        self.dtype = dtype
        self.pre_norm = spec.pre_norm
        self.norm = move_norm(spec.norm, device)
        self.projection_norm = move_norm(spec.projection_norm, device)
        self.projection = Linear((spec.projection,), place)
        # each stage returns what the next one takes; a norm takes floats
        last = Form(dtype)
        if spec.projection_norm is None:
            last = self.projection.form
        forms = [input_form(s.conv, dtype) for s in spec.convs[1:]]
        pairs = zip(spec.convs, [*forms, last], strict=True)
        self.stages = [
            ConvStage(stage, stage is spec.convs[0], form, place)
            for stage, form in pairs
        ]
        self.position = PositionalConv(spec.pos_conv, spec.pos_trim, place)
        self.blocks = [Block(x, spec.num_heads, place) for x in spec.blocks]
        self.rotation = None
        if spec.rotation is not None:
            self.rotation = spec.rotation.to(device, dtype).contiguous()

    def __call__(
        self, wave: torch.Tensor, samples: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Encodes float32 [batch, samples] to [batch, frames, channels].

        ``samples`` (int64 scalar) excludes the padding to a bucket, ``lengths``
        (int64 [batch]) also that of each utterance.
        """
        x = wave
        for stage in self.stages:
            x = stage(x, samples)
        if self.projection_norm is not None:
            x = normalize(self.projection_norm, x, self.projection.form)
        x = self.projection(x)
        # at least 1: a softmax over no keys is not finite
        real = count_frames(lengths, self.stages).clamp_(1, x.shape[1])
        inside = torch.arange(x.shape[1], device=x.device) < real[:, None]
        # a product with the mask would keep values that are not finite
        x = x.masked_fill_(~inside[:, :, None], 0.0)
        x = self.position(x)
        if self.pre_norm:
            if self.rotation is not None:
                x = x @ self.rotation.T
            for block in self.blocks:
                y = normalize(block.norm1, x, block.qkv.form)
                x = block.attend(y, x, real)
                y = normalize(block.norm2, x, block.up.form)
                x = block.feed(y, x)
            if self.rotation is not None:
                x = x @ self.rotation
            return normalize(self.norm, x, Form(self.dtype))
        norm = self.norm
        for block in self.blocks:
            x, y = _norm_both(norm, x, block.qkv.form, self.dtype)
            x = block.attend(y, x, real)
            x, y = _norm_both(block.norm1, x, block.up.form, self.dtype)
            x = block.feed(y, x)
            norm = block.norm2
        return normalize(norm, x, Form(self.dtype))
