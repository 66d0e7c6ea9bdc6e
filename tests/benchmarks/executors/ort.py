"""ONNX Runtime on the exported float model, and quantized by its own tools."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from workload import Executor, Prepared, Workload, size_of, time_once

#: Random utterances that ranges are taken from.
UTTERANCES = 4
#: Calls of each variant before one is chosen.
TRIALS = 5


def _folder(name: str, workload: Workload) -> Path:
    return workload.folder / f"ort-{name}"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


def _export(workload: Workload) -> None:
    """Exports any batch and length."""
    folder = _folder("fp32", workload)
    if folder.exists():
        return
    part = folder.with_name(f"part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    torch.onnx.export(
        workload.recognizer(),
        (workload.calibration_wavs(2),),
        str(part / "model.onnx"),
        input_names=["wavs"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch", 1: "samples"},),
        dynamo=True,
        external_data=True,
    )
    part.rename(folder)


class _Reader:
    """What ``quantize_static`` reads utterances from."""

    def __init__(self, wavs: torch.Tensor):
        self._rows: Iterator[np.ndarray] = iter(wavs[:, None].numpy())

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next one, or None."""
        row = next(self._rows, None)
        return None if row is None else {"wavs": row}


def _static(source: Path, target: Path, wavs: torch.Tensor) -> None:
    """Ranges from data. Products of two activations stay as they are."""
    from onnxruntime.quantization import QuantType, quantize_static

    quantize_static(
        source,
        target,
        _Reader(wavs),
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )


def _dynamic(source: Path, target: Path, wavs: torch.Tensor) -> None:
    """Ranges while it runs. ``ConvInteger`` has no fast kernel: without it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )


VARIANTS = {"static": _static, "dynamic": _dynamic}


def _quantize(workload: Workload) -> None:
    """Makes both variants and keeps the faster one."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder = _folder("int8", workload)
    if folder.exists():
        return
    _export(workload)
    part = folder.with_name(f"part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    # Its own inference of shapes does not know all that was exported.
    quant_pre_process(
        _folder("fp32", workload) / "model.onnx",
        part / "model.onnx",
        skip_symbolic_shape=True,
        save_as_external_data=True,
    )
    times = {}
    wavs = workload.calibration_wavs(UTTERANCES)
    for name, quantize in VARIANTS.items():
        (part / name).mkdir()
        quantize(part / "model.onnx", part / name / "model.onnx", wavs)
        run = _open(part / name, workload.options.threads)
        run(wavs[:1])
        times[name] = min(time_once(run, wavs[:1]).ms for _ in range(TRIALS))
    best = min(times, key=times.get)
    (part / best).rename(folder)
    shutil.rmtree(part)


def _open(folder: Path, threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def run(wavs: torch.Tensor) -> torch.Tensor:
        (out,) = session.run(None, {"wavs": wavs.numpy()})
        return torch.from_numpy(out)

    return run


def _load(name: str, workload: Workload) -> Prepared:
    folder = _folder(name, workload)
    run = _open(folder, workload.options.threads)
    return Prepared(run, size_of(_files(folder)))


def _executor(name: str, make: Callable[[Workload], None]) -> Executor:
    return Executor(partial(_load, name), make, partial(_folder, name))


CPU = {
    "ort_fp32": _executor("fp32", _export),
    "ort_int8": _executor("int8", _quantize),
}
