"""Rotation of the residual stream, folded into the weights.

After Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"
(2024), for LayerNorm instead of RMSNorm: the rotations keep the vector of
ones, so that they commute with the subtraction of the mean. Gain and bias of
each normalization are folded into the linears behind it, whose inputs become
mixtures of all channels: nearly normal, without outliers.

Pre-norm encoders only: in others the residual stream is itself normalized.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ...model.layers import Encoder
from ...model.rotation import BUFFER, attached_rotations, random_rotation


def can_rotate(encoder: Encoder) -> bool:
    """Whether an encoder normalizes before each sublayer."""
    blocks = encoder.model.encoder.layers
    return (
        bool(getattr(encoder.model.config, "do_stable_layer_norm", False))
        and len(blocks) > 0
        and getattr(blocks[0], "adapter_layer", None) is None
    )


def is_rotated(module: nn.Module, encoders: Iterable[Encoder]) -> bool:
    """Whether a module is a normalization whose output is rotated."""
    norms = {
        id(norm)
        for encoder in encoders
        for block in encoder.model.encoder.layers
        for norm, _ in _block_parts(block)[0]
    }
    return id(module) in norms


def _block_parts(
    block: nn.Module,
) -> tuple[list[tuple[nn.Module, list[nn.Module]]], list[nn.Module]]:
    """Normalizations with their linears; linears that add to the stream."""
    attention, forward = block.attention, block.feed_forward
    heads = [attention.q_proj, attention.k_proj, attention.v_proj]
    readers = [
        (block.layer_norm, heads),
        (block.final_layer_norm, [forward.intermediate_dense]),
    ]
    return readers, [attention.out_proj, forward.output_dense]


def _touched(encoder: Encoder) -> dict[str, nn.Module]:
    """All modules whose parameters change, by path."""
    found = {}
    for block in encoder.model.encoder.layers:
        readers, writers = _block_parts(block)
        for norm, linears in readers:
            found[id(norm)] = norm
            found.update({id(linear): linear for linear in linears})
        found.update({id(linear): linear for linear in writers})
    return {
        name: module
        for name, module in encoder.model.named_modules(prefix=encoder.path)
        if id(module) in found
    }


@torch.no_grad()
def _fold(encoder: Encoder, rotation: torch.Tensor) -> None:
    for block in encoder.model.encoder.layers:
        readers, writers = _block_parts(block)
        for norm, linears in readers:
            for linear in linears:
                # In float64: rounding errors here change the model.
                weight = linear.weight.double()
                linear.bias += (weight @ norm.bias.double()).float()
                weight = (weight * norm.weight) @ rotation.T
                linear.weight.copy_(weight)
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        for linear in writers:
            linear.weight.copy_(rotation @ linear.weight.double())
            linear.bias.copy_(rotation @ linear.bias.double())


@contextmanager
def rotated(encoders: Iterable[Encoder], seed: int = 0) -> Iterator[None]:
    """Context in which residual streams are rotated and outputs unchanged.

    ``encoders``: those for which :func:`can_rotate` holds.
    """
    encoders = list(encoders)
    kept = [
        (parameter, parameter.detach().clone())
        for encoder in encoders
        for module in _touched(encoder).values()
        for parameter in module.parameters(recurse=False)
    ]
    with ExitStack() as stack:
        try:
            for encoder in encoders:
                norm = encoder.model.encoder.layer_norm
                rotation = random_rotation(norm.weight.numel(), seed)
                _fold(encoder, rotation.double().to(norm.weight.device))
                stack.enter_context(
                    attached_rotations(
                        {"model": encoder.model},
                        {f"model.encoder.{BUFFER}": rotation},
                    )
                )
            yield
        finally:
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(value)


def rotated_floats(
    encoders: Iterable[Encoder], quantized: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Rotations and changed parameters that are not quantized, as copies.

    Called inside of :func:`rotated`; by name in the state dict.
    """
    quantized = set(quantized)
    found = {}
    for encoder in encoders:
        stream = encoder.model.encoder
        name = f"{encoder.path}.encoder.{BUFFER}"
        found[name] = getattr(stream, BUFFER).detach().clone()
        for name, module in _touched(encoder).items():
            found[f"{name}.bias"] = module.bias.detach().clone()
            if name not in quantized:
                found[f"{name}.weight"] = module.weight.detach().clone()
    return found
