"""OpenVINO on a CPU (extra ``cpu``)."""

from dataclasses import dataclass
from typing import Literal

from ...utils.typed import count
from ..base import Runtime


@dataclass(frozen=True)
class OpenVinoOptions:
    """``backend: openvino``."""

    #: Of one call; torch's number by default.
    threads: int | None = count(None)
    #: Where compiled graphs are kept.
    cache_folder: str | None = None
    #: Has no effect any more.
    max_models: int | None = count(None, 0)
    #: Of everything but the integer products; auto is bf16 where the CPU
    #: multiplies it.
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
