"""PyTorch's own ways on a CUDA device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from workload import Executor, Prepared, Workload

from .torch_ import bf16, in_bf16, model_mb, torchao_mb

_WARM_UP = 3


def _allow_tf32(allow: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def _fp32(tf32: bool, workload: Workload) -> Prepared:
    """The float model; TF32 rounds the factors of products to 10 bits."""
    model = workload.shared_recognizer

    def run(wavs: torch.Tensor) -> torch.Tensor:
        _allow_tf32(tf32)
        try:
            return model(wavs)
        finally:
            _allow_tf32(False)

    return Prepared(run, model_mb(model))


def _compiled(model: Callable, mode: str) -> Callable:
    run = in_bf16(torch.compile(model, mode=mode))

    def call(wavs: torch.Tensor) -> torch.Tensor:
        # Another compiled model's graphs may share this one's memory.
        torch.compiler.cudagraph_mark_step_begin()
        return run(wavs)

    return call


def _bf16_compile(workload: Workload) -> Prepared:
    """In bfloat16, through the compiler, which adds CUDA graphs."""
    model = workload.recognizer().to(torch.bfloat16)
    return Prepared(_compiled(model, "reduce-overhead"), model_mb(model))


def _bf16_graphs(workload: Workload) -> Prepared:
    """In bfloat16, without a compiler, as one CUDA graph."""
    model = workload.recognizer().to(torch.bfloat16)
    wavs = workload.wavs.to(torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            model(wavs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(wavs)

    def run(new: torch.Tensor) -> torch.Tensor:
        wavs.copy_(new)
        graph.replay()
        return logits.float()

    return Prepared(run, model_mb(model))


def _int8() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _float8() -> Any:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
    )

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


def _torchao_compile(config: Callable[[], Any], workload: Workload) -> Prepared:
    """Linear layers by torchao, activations dynamic, the rest in bfloat16,
    through the compiler as torchao's documentation has it."""
    from torchao.quantization import quantize_

    model = workload.recognizer().to(torch.bfloat16)
    quantize_(model, config())
    return Prepared(_compiled(model, "max-autotune"), torchao_mb(model))


CUDA = {
    "torch_fp32": Executor(partial(_fp32, True)),
    "torch_fp32_notf32": Executor(partial(_fp32, False)),
    "torch_bf16": Executor(bf16),
    "torch_bf16_compile": Executor(_bf16_compile),
    "torch_bf16_graphs": Executor(_bf16_graphs),
    "torchao_int8_compile": Executor(partial(_torchao_compile, _int8)),
    "torchao_float8_compile": Executor(partial(_torchao_compile, _float8)),
}
