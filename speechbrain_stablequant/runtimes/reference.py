"""The encoder in plain torch: exact integers, everything else in float32.

Slow; the reference from which other runtimes differ by rounding only.
"""

import torch
from torch.nn import functional as F

from ..core.encoder_spec import BlockSpec, EncoderSpec, Norm
from ..core.integer_layer import (
    AnyLayer,
    FloatLayer,
    multiply,
    reference_forward,
)


def apply_layer(layer: AnyLayer, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer: [..., in] of a Linear, [batch, in, time] of a Conv1d."""
    if not isinstance(layer, FloatLayer):
        return reference_forward(layer, x)
    return multiply(layer, x, layer.weight, layer.bias)


def apply_norm(norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    """Apply a norm: [..., channels], or [batch, channels, time] over time."""
    if norm is None:
        return x
    if norm.over_time:
        return F.group_norm(
            x, norm.weight.numel(), norm.weight, norm.bias, norm.eps
        )
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def valid_frame_mask(
    spec: EncoderSpec, lengths: torch.Tensor, frames: int
) -> torch.Tensor:
    """bool [batch, frames]: which frames of a padded batch are real."""
    real = torch.tensor([spec.frames(int(n)) for n in lengths])
    mask = torch.arange(frames)[None] < real[:, None]
    return mask.to(lengths.device)


def _block(
    spec: EncoderSpec, block: BlockSpec, x: torch.Tensor, mask
) -> torch.Tensor:
    batch, frames, channels = x.shape
    heads = spec.num_heads

    def split(y: torch.Tensor) -> torch.Tensor:
        return y.view(batch, frames, heads, -1).transpose(1, 2)

    y = apply_norm(block.norm1, x) if spec.pre_norm else x
    layers = (block.query, block.key, block.value)
    projected = (split(apply_layer(layer, y)) for layer in layers)
    attended = F.scaled_dot_product_attention(*projected, mask)
    attended = attended.transpose(1, 2).reshape(batch, frames, channels)
    x = x + apply_layer(block.out, attended)
    if not spec.pre_norm:
        x = apply_norm(block.norm1, x)
    y = apply_norm(block.norm2, x) if spec.pre_norm else x
    x = x + apply_layer(block.down, F.gelu(apply_layer(block.up, y)))
    return x if spec.pre_norm else apply_norm(block.norm2, x)


class ReferenceExecutor:
    """Executes an encoder in exact integer arithmetic, on any device."""

    def __init__(self, spec: EncoderSpec):
        self.spec = spec

    @torch.no_grad()
    def __call__(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode a batch, see :class:`.base.EncoderExecutor`."""
        spec = self.spec
        x = wavs[:, None]
        for stage in spec.convs:
            x = apply_layer(stage.conv, x)
            if stage.norm is not None and not stage.norm.over_time:
                x = apply_norm(stage.norm, x.transpose(1, 2)).transpose(1, 2)
            else:
                x = apply_norm(stage.norm, x)
            x = F.gelu(x)
        x = apply_norm(spec.projection_norm, x.transpose(1, 2))
        x = apply_layer(spec.projection, x)
        mask = None
        if lengths is not None:
            real = valid_frame_mask(spec, lengths, x.shape[1])
            x = x * real[:, :, None]
            mask = real[:, None, None, :]
        position = apply_layer(spec.pos_conv, x.transpose(1, 2))
        position = position[:, :, : position.shape[2] - spec.pos_trim]
        x = x + F.gelu(position).transpose(1, 2)
        if not spec.pre_norm:
            x = apply_norm(spec.norm, x)
        if spec.rotation is not None:
            x = x @ spec.rotation.T
        for block in spec.blocks:
            x = _block(spec, block, x, mask)
        if spec.rotation is not None:
            x = x @ spec.rotation
        return apply_norm(spec.norm, x) if spec.pre_norm else x
