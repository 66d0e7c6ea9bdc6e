"""Rotation of the residual stream, folded into the weights.

After Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"
(2024), for LayerNorm instead of RMSNorm: the rotations keep the vector of
ones, so that they commute with the subtraction of the mean. Gain and bias of
each normalization are folded into the linears behind it, whose inputs become
mixtures of all channels: nearly normal, without outliers.

Pre-norm encoders only: in others the residual stream is itself normalized.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ...model.layers import Encoder
from ...model.rotation import BUFFER, attached_rotations, random_rotation
from ...utils.patching import restored_values


def can_rotate(encoder: Encoder) -> bool:
    """Whether normalizations feed the linears of :func:`_readers` alone."""
    blocks = encoder.model.encoder.layers
    return (
        bool(getattr(encoder.model.config, "do_stable_layer_norm", False))
        and len(blocks) > 0
        and getattr(blocks[0], "adapter_layer", None) is None
        and not hasattr(blocks[0].attention, "gru_rel_pos_linear")
    )


def is_rotated(module: nn.Module, encoders: Iterable[Encoder]) -> bool:
    """Whether a module is a normalization whose output is rotated."""
    return any(
        module is norm
        for encoder in encoders
        for block in encoder.model.encoder.layers
        for norm, _ in _readers(block)
    )


def _readers(block: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Normalizations of the stream with the linears behind them."""
    attention, forward = block.attention, block.feed_forward
    heads = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [
        (block.layer_norm, heads),
        (block.final_layer_norm, [forward.intermediate_dense]),
    ]


def _writers(block: nn.Module) -> list[nn.Module]:
    return [block.attention.out_proj, block.feed_forward.output_dense]


def _touched(encoder: Encoder) -> dict[str, nn.Module]:
    found: set[nn.Module] = set()
    for block in encoder.model.encoder.layers:
        found.update(_writers(block))
        for norm, linears in _readers(block):
            found.update([norm, *linears])
    named = encoder.model.named_modules(prefix=encoder.path)
    return {name: module for name, module in named if module in found}


@torch.no_grad()
def _fold(encoder: Encoder, rotation: torch.Tensor) -> None:
    # In float64: rounding errors here change the model.
    for block in encoder.model.encoder.layers:
        for norm, linears in _readers(block):
            for linear in linears:
                weight = linear.weight.double()
                linear.bias += (weight @ norm.bias.double()).float()
                linear.weight.copy_((weight * norm.weight) @ rotation.T)
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        for linear in _writers(block):
            linear.weight.copy_(rotation @ linear.weight.double())
            linear.bias.copy_(rotation @ linear.bias.double())


@contextmanager
def rotated(encoders: Sequence[Encoder], seed: int = 0) -> Iterator[None]:
    """Context in which residual streams are rotated and outputs unchanged."""
    parameters = [
        parameter
        for encoder in encoders
        for module in _touched(encoder).values()
        for parameter in module.parameters(recurse=False)
    ]
    with restored_values(parameters), ExitStack() as stack:
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


def rotated_parameters(
    encoders: Iterable[Encoder],
) -> dict[str, torch.Tensor]:
    """Rotations and what :func:`rotated` changed, by name in the state dict."""
    changed = {}
    for encoder in encoders:
        rotation = getattr(encoder.model.encoder, BUFFER)
        changed[f"{encoder.path}.encoder.{BUFFER}"] = rotation
        for name, module in _touched(encoder).items():
            changed[f"{name}.bias"] = module.bias
            changed[f"{name}.weight"] = module.weight
    return changed
