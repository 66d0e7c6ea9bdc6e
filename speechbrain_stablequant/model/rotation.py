"""QuaRot's rotated residual stream: multiplied by an orthogonal matrix before
the first transformer block and by its transpose after the last one.

The linears that read and write the stream are rotated once, when the plan is
made. The two products that remain are hooks here; their matrix is a buffer of
the HuggingFace encoder, so it is stored, moved and loaded with the rest.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

BUFFER = "stream_rotation"  #: name of the buffer of the HuggingFace encoder
_HANDLES = "_stream_rotation_handles"


def random_rotation(size: int, seed: int = 0) -> torch.Tensor:
    """A random orthogonal matrix that preserves the vector of ones, float32."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    start = torch.randn(size, size, **options)
    start[:, 0] = 1
    # All columns but the first span the complement of the ones.
    rest = torch.linalg.qr(start)[0][:, 1:]
    inner = torch.linalg.qr(torch.randn(size - 1, size - 1, **options))[0]
    return (1 / size + rest @ inner @ rest.T).float()


def rotation_of(encoder: nn.Module) -> torch.Tensor | None:
    """The rotation of an encoder, float32 [channels, channels], or None."""
    found = getattr(encoder, BUFFER, None)
    return None if found is None else found.float()


def attach_rotation(encoder: nn.Module, rotation: torch.Tensor) -> None:
    """Rotates a pre-norm stream between the first and the last block."""
    if hasattr(encoder, BUFFER):
        raise ValueError("the encoder's stream is rotated already")
    encoder.register_buffer(BUFFER, rotation)
    # No closures: a deep copy's would still refer to this encoder.
    handles = [
        module.register_forward_pre_hook(partial(_turn, encoder, back))
        for module, back in (
            (encoder.layers[0], False),
            (encoder.layer_norm, True),
        )
    ]
    setattr(encoder, _HANDLES, handles)


def _turn(
    encoder: nn.Module, back: bool, module: nn.Module, args: tuple
) -> tuple:
    x, *others = args
    rotation = getattr(encoder, BUFFER).to(x.dtype)
    return (x @ (rotation if back else rotation.T), *others)


def detach_rotation(encoder: nn.Module) -> None:
    for handle in getattr(encoder, _HANDLES):
        handle.remove()
    delattr(encoder, _HANDLES)
    delattr(encoder, BUFFER)


# -- by the name in the state dict -------------------------------------------


def is_rotation(name: str) -> bool:
    """Whether a state dict name is that of a rotation."""
    return name.rpartition(".")[2] == BUFFER


def rotated_encoder(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The encoder that a rotation belongs to; KeyError if there is none."""
    key, _, rest = name.partition(".")
    try:
        encoder = modules[key].get_submodule(rest.rpartition(".")[0])
        if not hasattr(encoder, "layers") or not hasattr(encoder, "layer_norm"):
            raise AttributeError
    except (KeyError, AttributeError):
        raise KeyError(name) from None
    return encoder


def attach_rotations(
    modules: Mapping[str, nn.Module], floats: Mapping[str, torch.Tensor]
) -> list[nn.Module]:
    """Attaches all rotations among named tensors; returns their encoders."""
    names = [name for name in floats if is_rotation(name)]
    encoders = [rotated_encoder(modules, name) for name in names]
    for encoder, name in zip(encoders, names, strict=True):
        device = encoder.layer_norm.weight.device
        attach_rotation(encoder, floats[name].detach().clone().to(device))
    return encoders


@contextmanager
def attached_rotations(
    modules: Mapping[str, nn.Module], floats: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    encoders = attach_rotations(modules, floats)
    try:
        yield
    finally:
        for encoder in encoders:
            detach_rotation(encoder)
