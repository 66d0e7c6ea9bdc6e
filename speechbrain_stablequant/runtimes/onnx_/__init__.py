"""ONNX: the graph of an encoder and its head, and ONNX Runtime as a runtime."""

from dataclasses import dataclass
from typing import Literal

from ..base import Options, Runtime, option


@dataclass(frozen=True)
class OnnxOptions(Options):
    """``backend: onnx``."""

    #: Of an operator; torch's number by default.
    threads: int | None = option(None, least=1)
    #: What computes.
    provider: Literal["cpu", "cuda"] = option("cpu")


RUNTIME = Runtime(
    OnnxOptions,
    encoder="onnx_.executor:OnnxExecutor",
    layer_runner="onnx_.layer_runner:OnnxRunner",
    device="cpu",
    needs=("onnx", "onnxruntime"),
    install="speechbrain_stablequant[onnx]",
)
