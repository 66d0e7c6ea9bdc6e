"""OpenVINO on a CPU (extra ``cpu``)."""

from dataclasses import dataclass
from typing import Literal

from ...utils.typed import count
from ..base import Runtime


@dataclass(frozen=True)
class OpenVinoOptions:
    """``backend: openvino``.

    Arguments
    ---------
    threads : int or None
        Threads of one call; None for torch's number.
    cache_folder : str or None
        Where compiled graphs are kept; None keeps none.
    max_models : int or None
        Has no effect any more.
    precision : str
        Of everything but the integer products: ``bf16``, ``f32``, or ``auto``,
        which is bf16 where the CPU multiplies it.
    """

    threads: int | None = count(None)
    cache_folder: str | None = None
    max_models: int | None = count(None, 0)
    precision: Literal["auto", "bf16", "f32"] = "auto"


RUNTIME = Runtime(
    OpenVinoOptions,
    encoder="openvino_.executor:OpenVINOExecutor",
    layer_runner="openvino_.layer_runner:OpenVINORunner",
    part="captured.executor:part_forward",
    device="cpu",
    needs=("openvino",),
    install="speechbrain_stablequant[cpu]",
    streams=True,
)
