"""TensorRT with this project's scales: quantizers and dequantizers explicit in
our own ONNX export, the rest in float16.

Written by TensorRT 10's documentation; it has not run yet.
"""

from pathlib import Path

import torch
from workload import Executor, Prepared, Workload

from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.model.encoders import find_encoders
from speechbrain_stablequant.runtimes.onnx_.model import (
    describe_head,
    export_onnx,
)

from .ours import integer_modules


def _export(workload: Workload, path: Path) -> None:
    modules, integers, _ = integer_modules(workload)
    (encoder,) = find_encoders(modules)
    integers = {name: layer.loaded() for name, layer in integers.items()}
    export_onnx(
        path,
        describe_encoder(encoder.model, encoder.path, integers),
        describe_head({"ctc_lin": modules["ctc_lin"]}, integers),
        use_lengths=False,
        target="portable",
    )


def _engine(path: Path, shape: tuple[int, ...]):
    """The engine of a file for inputs of one shape."""
    import tensorrt

    if not hasattr(tensorrt.BuilderFlag, "FP16"):
        raise RuntimeError(
            "tensorrt: from version 11 on all but int8 would be float32"
        )
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()):
        raise RuntimeError(f"tensorrt: {parser.get_error(0)}")
    config = builder.create_builder_config()
    for flag in ("INT8", "FP16"):
        config.set_flag(getattr(tensorrt.BuilderFlag, flag))
    profile = builder.create_optimization_profile()
    profile.set_shape("wave", shape, shape, shape)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("tensorrt: builds no engine of the exported model")
    return tensorrt.Runtime(logger).deserialize_cuda_engine(plan)


def _load(workload: Workload) -> Prepared:
    import tensorrt  # noqa: F401  # before the export, which takes a while

    path = workload.shape_folder() / "tensorrt.onnx"
    _export(workload, path)
    engine = _engine(path, tuple(workload.wavs.shape))
    context = engine.create_execution_context()

    def run(wavs: torch.Tensor) -> torch.Tensor:
        context.set_input_shape("wave", tuple(wavs.shape))
        shape = tuple(context.get_tensor_shape("logits"))
        logits = torch.empty(shape, device=wavs.device)
        context.set_tensor_address("wave", wavs.data_ptr())
        context.set_tensor_address("logits", logits.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream
        if not context.execute_async_v3(stream):
            raise RuntimeError("tensorrt: the engine does not run")
        return logits

    return Prepared(run, path.stat().st_size / 1e6)


CUDA = {"tensorrt_int8": Executor(_load)}
