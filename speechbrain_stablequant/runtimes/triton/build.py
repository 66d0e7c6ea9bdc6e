"""Packs an encoder, or a layer outside of it, for the kernels."""

from collections.abc import Callable
from pathlib import Path

import torch

from ...core.encoder_spec import EncoderSpec
from ...core.integer_layer import IntegerLayer
from ..base import LayerExecutor
from .executor import TritonExecutor, check_device, make_tuner
from .kernels import library
from .layers import Head, check_plain_conv


def _device(device: str | torch.device | None) -> torch.device:
    """The requested device, by default CUDA, checked."""
    if device is None:
        if not torch.cuda.is_available() and not library.INTERPRETED:
            raise ValueError(
                "backend triton: there is no CUDA device; write backend: "
                "auto, or device 'cpu' for the operators in plain torch"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        check_device(device)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def make_executor(
    spec: EncoderSpec,
    device: str | torch.device | None = None,
    dtype: str = "float16",
    max_graphs: int = 48,
    tune: bool = True,
    cache: str | Path | None = None,
) -> Callable[..., torch.Tensor]:
    """Packs an encoder for the kernels.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder; its first convolution has at most 128 taps.
    device : str, torch.device or None
        By default the model's CUDA device, else the current one. On ``"cpu"``
        the operators run in plain torch, or in Triton's interpreter with
        ``TRITON_INTERPRET=1``: slow, for tests.
    dtype, max_graphs, tune, cache
        As in :class:`..options.TritonOptions`. The default number of graphs
        holds all lengths from 0.5 s to 32 s at one batch size.

    Returns
    -------
    TritonExecutor

    Raises
    ------
    ValueError
        No CUDA device or one that is too old, or a layer without a kernel.
    """
    if device is None and spec.norm.weight.is_cuda:
        device = spec.norm.weight.device
    device = _device(device)
    return TritonExecutor(
        spec,
        device,
        getattr(torch, dtype),
        max_graphs,
        make_tuner(device, tune, cache),
    )


def make_layer(
    layer: IntegerLayer, device: str | torch.device | None = None
) -> LayerExecutor:
    """Packs a layer outside the encoder, such as the head.

    It is a Linear, or a Conv1d without padding, dilation or groups; another one
    is refused. Takes the float layer's input, returns float32.
    """
    if layer.kind != "linear":
        check_plain_conv(layer)
    return Head(layer, _device(device))
