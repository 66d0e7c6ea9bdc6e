"""The triton runtime: int8 kernels on CUDA, the rest in 16 bit.

Works with every wav2vec 2.0 and HuBERT encoder that
:func:`~speechbrain_stablequant.model.encoder_spec.describe_encoder` describes,
with any of its layers left in floating point. The kernels and what they do
are in :mod:`speechbrain_stablequant.runtimes.triton.kernels`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...core.integer_layer import IntegerLayer
from ...model.encoder_spec import EncoderSpec
from ..base import LayerExecutor


def _import(name: str) -> Any:
    """A module of this package that needs Triton."""
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
    """The device asked for, by default CUDA."""
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
    """Packs an encoder for its kernels.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    device : str, torch.device or None
        Where it runs; by default the CUDA device that the model is on, else
        the current one. On ``"cpu"`` the operators are computed by plain
        torch, or by Triton's interpreter under ``TRITON_INTERPRET=1``: slow,
        for tests.
    dtype : str
        ``"float16"``, ``"bfloat16"`` or ``"float32"``: of the residual stream
        and of the attention.
    max_graphs : int
        CUDA graphs to keep, one for each (batch, length) bucket; 0: none.
        There are eight lengths between a power of two and the next, so the
        default holds all from half a second to 32 s at one batch size.
    tune : bool
        Whether tiles are measured when a shape is first seen; otherwise they
        are chosen by rule.
    cache : str, Path or None
        JSON file of measured tiles; by default one for each card in the
        user's cache folder.

    Returns
    -------
    TritonExecutor

    Raises
    ------
    ValueError
        No CUDA device, one that is too old, an unknown dtype, a layer that
        there is no kernel for.
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
    """A layer outside the encoder, such as the head.

    Arguments
    ---------
    layer : IntegerLayer
        A Linear, or a Conv1d without padding, dilation or groups.
    device : str, torch.device or None
        Where it runs; by default the current CUDA device.

    Returns
    -------
    callable
        Float input as the float layer takes it, float32 output.

    Raises
    ------
    ValueError
        A convolution that there is no kernel for.
    """
    layers = _import(".layers")
    if layer.kind != "linear":
        layers.check_plain_conv(layer)
    return layers.Head(layer, _device(device))
