"""ONNX: the graph of an encoder and its head, and ONNX Runtime as a runtime."""

from dataclasses import dataclass
from typing import Literal

from ...utils.typed import count
from ..base import Runtime


@dataclass(frozen=True)
class OnnxOptions:
    """``backend: onnx``.

    Arguments
    ---------
    threads : int or None
        Threads of an operator; None for torch's number.
    provider : str
        What computes: ``cpu`` or ``cuda``.
    """

    threads: int | None = count(None)
    provider: Literal["cpu", "cuda"] = "cpu"


RUNTIME = Runtime(
    OnnxOptions,
    encoder="onnx_.executor:OnnxExecutor",
    layer_runner="onnx_.layer_runner:OnnxRunner",
    device="cpu",
    needs=("onnx", "onnxruntime"),
    install="speechbrain_stablequant[onnx]",
)
