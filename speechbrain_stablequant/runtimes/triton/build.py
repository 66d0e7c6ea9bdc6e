"""Whether a device runs the kernels; packs an encoder or a layer for them."""

import functools
import logging
from pathlib import Path
from typing import Any

import torch
import triton

from ...core.encoder_spec import EncoderSpec
from ...core.integer_layer import IntegerLayer
from ...utils.store import Store, machine_store
from . import TritonOptions
from .executor import TritonExecutor
from .kernels import library
from .kernels.architectures import card_of
from .kernels.trial import (
    card_file,
    driver,
    failure_on_card,
    kernels_digest,
)
from .kernels.tuning import Tuner
from .layers import Head, check_plain_conv

logger = logging.getLogger(__name__)

#: Kernels of earlier versions need more shared memory than a card has.
MIN_TRITON = (3, 6)
#: Largest recorded value of a float16 residual stream: a quarter of what
#: float16 holds.
MAX_HALF_RESIDUAL = 2.0**14
#: Lowest compute capability with the integer instructions of the kernels.
MIN_CAPABILITY = (8, 0)


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why a device cannot run the kernels, or None if it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
        return (
            f"triton {triton.__version__} is too old: its kernels need more "
            "shared memory than a card has; install a later torch, which "
            "brings triton 3.6 or more, or use backend: torch"
        )
    card = torch.cuda.get_device_name(device)
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        return (
            f"{card} has compute capability {found[0]}.{found[1]}, 8.0 or "
            "more is needed; use backend: torch"
        )
    failure = failure_on_card(device, card, machine_store("triton"))
    return failure and (
        f"{failure} (tried on {card}); use backend: torch, and report it"
    )


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
    if device.type != "cuda":
        return device
    reason = why_not(device)
    if reason is not None:
        raise ValueError(f"backend triton: {reason}")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def make_tuner(
    device: torch.device, tune: bool, cache: str | Path | None
) -> Tuner | None:
    """What chooses the tiles of a device; None without CUDA."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(device)
    about = f"{card}, {driver()}"
    if cache is not None:
        place = Store(Path(cache).parent)
        return Tuner(place, Path(cache).name, about, tune=tune)
    # the best tiles change with the kernels
    version = f"{triton.__version__}-{kernels_digest()[:8]}"
    version += "" if tune else "-untuned"
    name = card_file(card, version)
    return Tuner(machine_store("triton"), name, about, tune=tune)


def residual_dtype(spec: EncoderSpec, asked: str) -> torch.dtype:
    """Of the residual stream: float16 where it cannot overflow. A rotation
    moves its values, for which there is no record."""
    if asked != "auto":
        return getattr(torch, asked)
    peak = spec.residual_amax if spec.rotation is None else None
    fits = peak is not None and peak <= MAX_HALF_RESIDUAL
    return torch.float16 if fits else torch.bfloat16


def make_executor(
    spec: EncoderSpec, device: str | torch.device | None = None, **options: Any
) -> TritonExecutor:
    """Packs an encoder, by default on its own CUDA device; raises ValueError
    for a device or a layer without a kernel. On ``"cpu"`` the operators run in
    plain torch or, interpreted, in Triton."""
    chosen = TritonOptions(device, **options)
    if device is None and spec.norm.weight.is_cuda:
        device = spec.norm.weight.device
    device = _device(device)
    remark = card_of(device).remark()
    if remark is not None and device.type == "cuda":
        logger.warning(
            "triton: %s: %s", torch.cuda.get_device_name(device), remark
        )
    tuner = make_tuner(device, chosen.tune, chosen.cache)
    dtype = residual_dtype(spec, chosen.dtype)
    graphs = (chosen.max_graphs, chosen.max_graph_mb)
    return TritonExecutor(spec, device, dtype, *graphs, tuner)


def make_layer(
    layer: IntegerLayer, device: str | torch.device | None = None
) -> Head:
    """Packs a layer outside the encoder, such as the head: a Linear, or a
    Conv1d without padding, dilation or groups; another one is refused."""
    if layer.kind != "linear":
        check_plain_conv(layer)
    return Head(layer, _device(device))
