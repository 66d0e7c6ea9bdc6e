"""An encoder on the operators of ``kernels``, without any host decision.

What depends on the values of the input (how many frames are real) comes in
tensors, so that one capture of the launches serves every input of a shape.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..encoder import BlockSpec, EncoderSpec
from .layers import (
    OPS,
    ConvStage,
    Form,
    Linear,
    PositionalConv,
    Projections,
    input_form,
    move_norm,
    normalize,
)


def convolved(frames, kernel: int, stride: int):
    """Frames after a convolution: of a number or of a tensor of them."""
    return (frames - kernel) // stride + 1


class Block:
    """A transformer block.

    Arguments
    ---------
    spec : BlockSpec
        The block.
    num_heads : int
        Attention heads.
    dtype : torch.dtype
        Of floating-point activations.
    device : torch.device
        Where it runs.
    """

    def __init__(
        self,
        spec: BlockSpec,
        num_heads: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        qkv = (spec.query, spec.key, spec.value)
        self.qkv = Projections(qkv, dtype, device)
        self.out = Linear((spec.out,), dtype, device)
        self.up = Linear((spec.up,), dtype, device)
        self.down = Linear((spec.down,), dtype, device)
        self.norm1 = move_norm(spec.norm1, device)
        self.norm2 = move_norm(spec.norm2, device)
        self.num_heads = num_heads

    def attend(
        self, y: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """``x + out(attention(y))``; ``y`` in the form of the projections."""
        batch, frames, channels = x.shape
        qkv = self.qkv(y).view(batch, frames, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        attended = attended.transpose(1, 2).reshape(batch, frames, channels)
        quantized = normalize(None, attended, self.out.form)
        return self.out(quantized, residual=x)

    def feed(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``x + down(gelu(up(y)))``; ``y`` in the form of ``up``."""
        return self.down(self.up(y, self.down.form, gelu=True), residual=x)


def _norm_both(
    norm, x: torch.Tensor, form: Form, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm in 16 bit and in a form."""
    if not form.quantized:
        y = normalize(norm, x, Form(dtype))
        return y, y
    return OPS.layer_norm_both(
        x, norm.weight, norm.bias, norm.eps, dtype, form.inverse, form.limit
    )


class Network:
    """The whole encoder.

    Arguments
    ---------
    spec : EncoderSpec
        What it computes.
    dtype : torch.dtype
        Of the residual stream and of the attention.
    device : torch.device
        Where it runs.
    """

    def __init__(
        self, spec: EncoderSpec, dtype: torch.dtype, device: torch.device
    ):
        self.dtype = dtype
        self.pre_norm = spec.pre_norm
        self.norm = move_norm(spec.norm, device)
        self.projection_norm = move_norm(spec.projection_norm, device)
        self.projection = Linear((spec.projection,), dtype, device)
        # A norm between them takes the last stage's output as floats.
        last = (
            input_form(spec.projection, dtype)
            if spec.projection_norm is None
            else Form(dtype)
        )
        forms = [input_form(s.conv, dtype) for s in spec.convs[1:]]
        self.stages = [
            ConvStage(s.conv, s.norm, form, dtype, device)
            for s, form in zip(spec.convs, [*forms, last], strict=True)
        ]
        self.position = PositionalConv(
            spec.pos_conv, spec.pos_trim, dtype, device
        )
        self.blocks = [
            Block(block, spec.num_heads, dtype, device) for block in spec.blocks
        ]

    def front(
        self, wave: torch.Tensor, frames: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The convolutions: float32 [batch, samples] to the projection."""
        x = wave
        for stage, count in zip(self.stages, frames, strict=True):
            x = stage(x, count)
        if self.projection_norm is not None:
            x = normalize(self.projection_norm, x, self.projection.form)
        return self.projection(x)

    def __call__(
        self,
        wave: torch.Tensor,
        frames: Sequence[torch.Tensor],
        real: torch.Tensor | None,
    ) -> torch.Tensor:
        """Encodes a batch.

        Arguments
        ---------
        wave : torch.Tensor
            float32 [batch, samples], contiguous.
        frames : sequence of torch.Tensor
            int64 scalars: frames of each convolution's output that are no
            padding to a bucket.
        real : torch.Tensor or None
            int64 [batch]: real frames of each utterance, at least 1; None:
            all of them.

        Returns
        -------
        torch.Tensor
            16 bit [batch, frames, channels].
        """
        x = self.front(wave, frames)
        mask = None
        if real is not None:
            inside = torch.arange(x.shape[1], device=x.device) < real[:, None]
            # a product would keep what is not finite
            x = x.masked_fill(~inside[:, :, None], 0.0)
            mask = inside[:, None, None, :]
        x = self.position(x)
        if self.pre_norm:
            for block in self.blocks:
                y = normalize(block.norm1, x, block.qkv.form)
                x = block.attend(y, x, mask)
                y = normalize(block.norm2, x, block.up.form)
                x = block.feed(y, x)
            return normalize(self.norm, x, Form(self.dtype))
        norm = self.norm
        for block in self.blocks:
            x, y = _norm_both(norm, x, block.qkv.form, self.dtype)
            x = block.attend(y, x, mask)
            x, y = _norm_both(block.norm1, x, block.up.form, self.dtype)
            x = block.feed(y, x)
            norm = block.norm2
        return normalize(norm, x, Form(self.dtype))
