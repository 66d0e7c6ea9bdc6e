"""OpenVINO on a CPU: the fastest integers there (extra ``cpu``)."""

from dataclasses import dataclass
from typing import Literal

from ..base import Options, Runtime, option


@dataclass(frozen=True)
class OpenVinoOptions(Options):
    """``backend: openvino``."""

    #: Of one call; torch's number by default.
    threads: int | None = option(None, least=1)
    #: Where compiled graphs are kept.
    cache_folder: str | None = option(None)
    #: Has no effect any more.
    max_models: int | None = option(None, least=0)
    #: Of everything but the integer products.
    precision: Literal["auto", "bf16", "f32"] = option("auto")


RUNTIME = Runtime(
    OpenVinoOptions,
    encoder="openvino_.executor:OpenVINOExecutor",
    layer_runner="openvino_.layer_runner:OpenVINORunner",
    device="cpu",
    needs=("openvino",),
    install="speechbrain_stablequant[cpu]",
    streams=True,
)
