"""PyTorch's own ways on a CPU, each set up as its documentation says.

None has a file format that is loaded as it is: all convert the float model
when they are loaded, and ``size_mb`` counts the converted tensors.
"""

from collections.abc import Callable
from itertools import chain

import torch
from models import Recognizer
from torch import nn
from workload import Executor, Prepared, Workload, size_of_tensors


def model_mb(model: nn.Module) -> float:
    """Size of a model's parameters and buffers in 10^6 bytes."""
    return size_of_tensors([*model.parameters(), *model.buffers()])


def _compiled(model: Callable) -> Callable:
    # Freezing lets the compiler lay out weights for the matrix kernels.
    return torch.compile(model, options={"freezing": True})


def fp32(workload: Workload) -> Prepared:
    """The float model as it is."""
    model = workload.shared_recognizer
    return Prepared(model, model_mb(model))


def fp32_compile(workload: Workload) -> Prepared:
    """The float model through the compiler."""
    model = workload.shared_recognizer
    return Prepared(_compiled(model), model_mb(model))


def _bf16(workload: Workload) -> Recognizer:
    return workload.recognizer().to(torch.bfloat16)


def in_bf16(run: Callable) -> Callable:
    """From and to float32 around a model in bfloat16."""

    def call(wavs: torch.Tensor) -> torch.Tensor:
        return run(wavs.to(torch.bfloat16)).float()

    return call


def bf16(workload: Workload) -> Prepared:
    """Weights and activations in bfloat16."""
    model = _bf16(workload)
    return Prepared(in_bf16(model), model_mb(model))


def bf16_compile(workload: Workload) -> Prepared:
    """In bfloat16, through the compiler."""
    model = _bf16(workload)
    return Prepared(in_bf16(_compiled(model)), model_mb(model))


def ao_dynamic(workload: Workload) -> Prepared:
    """Linear layers by ``torch.ao.quantization.quantize_dynamic``, as in
    SpeechBrain's tutorial on quantization."""
    from torch.ao.quantization import quantize_dynamic

    model = quantize_dynamic(
        workload.recognizer(), {nn.Linear}, dtype=torch.qint8, inplace=True
    )
    packed = chain.from_iterable(
        m._packed_params._weight_bias()
        for m in model.modules()
        if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)
    )
    size = size_of_tensors([t.detach() for t in packed if t is not None])
    return Prepared(model, size + model_mb(model))


def torchao_int8_compile(workload: Workload) -> Prepared:
    """Linear layers by torchao, activations dynamic, the rest in bfloat16,
    through the compiler."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    model = _bf16(workload)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return Prepared(in_bf16(_compiled(model)), torchao_mb(model))


def torchao_mb(model: nn.Module) -> float:
    """Size of a model with tensors that are made of tensors."""
    parts = []
    for tensor in chain(model.parameters(), model.buffers()):
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            parts += [getattr(tensor, name) for name in names]
        else:
            parts.append(tensor)
    return size_of_tensors(parts)


def pt2e_x86(workload: Workload) -> Prepared:
    """Static int8 by export, with the quantizer for Inductor on x86; it
    knows linear layers, and no convolution in one dimension."""
    from torchao.quantization.pt2e.quantize_pt2e import (
        convert_pt2e,
        prepare_pt2e,
    )
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    quantizer.set_global(
        x86_inductor_quantizer.get_default_x86_inductor_quantization_config()
    )
    # Only a strict export says which operators were a linear layer, and the
    # quantizer passes over the others without a word.
    exported = torch.export.export(
        workload.recognizer(), (workload.wavs,), strict=True
    )
    model = prepare_pt2e(exported.module(), quantizer)
    model(workload.wavs)
    model = convert_pt2e(model)
    if not any("quantize" in str(node.target) for node in model.graph.nodes):
        raise RuntimeError("X86InductorQuantizer quantized no layer")
    return Prepared(_compiled(model), model_mb(model))


CPU = {
    "torch_fp32": Executor(fp32),
    "torch_fp32_compile": Executor(fp32_compile),
    "torch_bf16": Executor(bf16),
    "torch_bf16_compile": Executor(bf16_compile),
    "torch_ao_dynamic": Executor(ao_dynamic),
    "torchao_int8_compile": Executor(torchao_int8_compile),
    "torch_pt2e_x86": Executor(pt2e_x86),
}
