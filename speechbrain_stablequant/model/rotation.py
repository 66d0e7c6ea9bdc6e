"""A rotated residual stream: what flows through the transformer blocks,
multiplied by an orthogonal matrix before the first block and by its transpose
behind the last one.

A LayerNorm without gain and bias commutes with a rotation that keeps the
vector of ones where it is: the mean stays the mean, the norm stays the norm.
So the linears that read and write the stream can be rotated once and for all,
and the float model computes what it did (see :mod:`.baselines.rotate`). What
is left to do at run time are the two products here.

The matrix is a buffer of the HuggingFace encoder, so that it is stored, moved
and loaded with everything else, and two hooks multiply by it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

#: Name of the buffer of the HuggingFace encoder.
BUFFER = "stream_rotation"
_HANDLES = "_stream_rotation_handles"


def random_rotation(size: int, seed: int = 0) -> torch.Tensor:
    """A random orthogonal matrix that keeps the vector of ones.

    Arguments
    ---------
    size : int
        Rows and columns.
    seed : int
        The same seed gives the same matrix.

    Returns
    -------
    torch.Tensor
        float32 [size, size].

    Example
    -------
    >>> rotation = random_rotation(6)
    >>> torch.allclose(rotation @ rotation.T, torch.eye(6), atol=1e-6)
    True
    >>> torch.allclose(rotation @ torch.ones(6), torch.ones(6), atol=1e-6)
    True
    """
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    start = torch.randn(size, size, **options)
    start[:, 0] = 1
    # All columns but the first span what is orthogonal to the ones.
    rest = torch.linalg.qr(start)[0][:, 1:]
    inner = torch.linalg.qr(torch.randn(size - 1, size - 1, **options))[0]
    return (1 / size + rest @ inner @ rest.T).float()


def rotation_of(encoder: nn.Module) -> torch.Tensor | None:
    """The rotation of a HuggingFace encoder, float32, or None.

    Arguments
    ---------
    encoder : torch.nn.Module
        The part of the model with ``layers`` and ``layer_norm``.

    Returns
    -------
    torch.Tensor or None
        [channels, channels].
    """
    found = getattr(encoder, BUFFER, None)
    return None if found is None else found.float()


def attach_rotation(encoder: nn.Module, rotation: torch.Tensor) -> None:
    """Rotates the stream of an encoder between its first and its last block.

    Arguments
    ---------
    encoder : torch.nn.Module
        The part of a HuggingFace model with ``layers`` and ``layer_norm``,
        which normalizes before each sublayer.
    rotation : torch.Tensor
        [channels, channels].

    Raises
    ------
    ValueError
        It has one already.

    Example
    -------
    >>> encoder = nn.Module()
    >>> encoder.layers = nn.ModuleList([nn.Identity()])
    >>> encoder.layer_norm = nn.Identity()
    >>> attach_rotation(encoder, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> x = encoder.layers[0](torch.tensor([[1.0, 2.0]]))
    >>> x, encoder.layer_norm(x)
    (tensor([[2., 1.]]), tensor([[1., 2.]]))
    >>> detach_rotation(encoder)
    """
    if hasattr(encoder, BUFFER):
        raise ValueError("the encoder's stream is rotated already")
    encoder.register_buffer(BUFFER, rotation)
    # No closures: those of a deep copy would go on with this encoder.
    handles = (
        encoder.layers[0].register_forward_pre_hook(partial(_turn, encoder)),
        encoder.layer_norm.register_forward_pre_hook(
            partial(_turn_back, encoder)
        ),
    )
    setattr(encoder, _HANDLES, handles)


def _turn(encoder: nn.Module, module: nn.Module, args: tuple) -> tuple:
    x, *others = args
    return (x @ getattr(encoder, BUFFER).to(x.dtype).T, *others)


def _turn_back(encoder: nn.Module, module: nn.Module, args: tuple) -> tuple:
    x, *others = args
    return (x @ getattr(encoder, BUFFER).to(x.dtype), *others)


def detach_rotation(encoder: nn.Module) -> None:
    """Takes the rotation away again.

    Arguments
    ---------
    encoder : torch.nn.Module
        That has one.
    """
    for handle in getattr(encoder, _HANDLES):
        handle.remove()
    delattr(encoder, _HANDLES)
    delattr(encoder, BUFFER)


# -- by the name in the state dict -------------------------------------------


def is_rotation(name: str) -> bool:
    """Whether a tensor of a state dict is a rotation.

    Example
    -------
    >>> is_rotation("wav2vec2.model.encoder.stream_rotation")
    True
    """
    return name.rpartition(".")[2] == BUFFER


def rotated_encoder(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The encoder that a rotation of this name belongs to.

    Arguments
    ---------
    modules : Mapping
        Modules by key.
    name : str
        Of the rotation in the state dict.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    KeyError
        There is none.
    """
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
    """Attaches all rotations among named tensors.

    Arguments
    ---------
    modules : Mapping
        Modules by key.
    floats : Mapping
        Tensors by their name in the state dict; others are left alone.

    Returns
    -------
    list of torch.nn.Module
        The encoders that have one now.

    Raises
    ------
    KeyError
        A name that belongs to no encoder.
    """
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
    """Context in which the rotations among named tensors are attached.

    Arguments
    ---------
    modules, floats : Mapping
        As of :func:`attach_rotations`.
    """
    encoders = attach_rotations(modules, floats)
    try:
        yield
    finally:
        for encoder in encoders:
            detach_rotation(encoder)
