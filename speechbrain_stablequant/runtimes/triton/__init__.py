"""The triton runtime: int8 kernels on CUDA, the rest in 16 bit.

Supports every wav2vec 2.0 and HuBERT encoder that `describe_encoder` describes,
with any of its layers in floating point. The operators are in ``kernels``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...core.encoder_spec import EncoderSpec
from ...core.integer_layer import IntegerLayer
from ..base import LayerExecutor


def _import(name: str) -> Any:
    """Imports a module of this folder that needs Triton."""
    import importlib

    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "backend triton: the package 'triton' is missing; it comes with "
            "torch for CUDA on Linux, or run pip install triton"
        ) from error
    return importlib.import_module(name, __name__)


def _device(device: str | torch.device | None) -> torch.device:
    """The requested device, by default CUDA, checked."""
    if device is None:
        interpreted = _import(".kernels.library").INTERPRETED
        if not torch.cuda.is_available() and not interpreted:
            raise ValueError(
                "backend triton: there is no CUDA device; write backend: "
                "auto, or device 'cpu' for the operators in plain torch"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        _import(".executor").check_device(device)
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
        The encoder.
    device : str, torch.device or None
        Where to run; by default the model's CUDA device, else the current one.
        On ``"cpu"`` the operators run in plain torch, or in Triton's
        interpreter with ``TRITON_INTERPRET=1``: slow, for tests.
    dtype : str
        Of the residual stream and the attention: ``"float16"``,
        ``"bfloat16"`` or ``"float32"``.
    max_graphs : int
        Number of CUDA graphs kept, one per (batch, length) bucket; 0: none.
        There are eight buckets per doubling of the length, so the default
        holds all lengths from 0.5 s to 32 s at one batch size.
    tune : bool
        Whether to measure tiles when a shape is first seen; otherwise they
        are chosen by an estimate.
    cache : str, Path or None
        JSON file of measured tiles; by default one per card in the user's
        cache folder.

    Returns
    -------
    TritonExecutor

    Raises
    ------
    ValueError
        No CUDA device or one that is too old, an unknown dtype, or a layer
        without a kernel.
    ImportError
        Triton is not installed.
    """
    executor = _import(".executor")
    if dtype not in executor.DTYPES:
        raise ValueError(
            f"backend triton: dtype '{dtype}' is none of "
            f"{', '.join(executor.DTYPES)}"
        )
    if device is None and spec.norm.weight.is_cuda:
        device = spec.norm.weight.device
    device = _device(device)
    return executor.TritonExecutor(
        spec,
        device,
        executor.DTYPES[dtype],
        max_graphs,
        executor.make_tuner(device, tune, cache),
    )


def make_layer(
    layer: IntegerLayer, device: str | torch.device | None = None
) -> LayerExecutor:
    """Packs a layer outside the encoder, such as the head.

    Arguments
    ---------
    layer : IntegerLayer
        A Linear, or a Conv1d without padding, dilation or groups.
    device : str, torch.device or None
        Where to run; by default the current CUDA device.

    Returns
    -------
    callable
        Takes the float layer's input, returns float32.

    Raises
    ------
    ValueError
        A convolution without a kernel.
    """
    layers = _import(".layers")
    if layer.kind != "linear":
        layers.check_plain_conv(layer)
    return layers.Head(layer, _device(device))
