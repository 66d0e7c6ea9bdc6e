"""OpenVINO on the converted float model, and quantized by NNCF."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from workload import Executor, Prepared, Workload, size_of

from speechbrain_stablequant.runtimes.cpu import cpu_class

#: Random utterances that NNCF takes its ranges from.
UTTERANCES = 4


def _paths(path: Path) -> list[Path]:
    return [path, path.with_suffix(".bin")]


def _write(path: Path, model: Any) -> None:
    """Writes an OpenVINO model, the file that names it last."""
    import openvino as ov

    part = path.with_name(f"part-{path.name}")
    ov.save_model(model, part, compress_to_fp16=False)
    part.with_suffix(".bin").replace(path.with_suffix(".bin"))
    part.replace(path)


def _float_path(workload: Workload) -> Path:
    return workload.folder / "fp32.xml"


def _convert(workload: Workload) -> None:
    import openvino as ov

    path = _float_path(workload)
    if not path.exists():
        model = ov.convert_model(
            workload.recognizer(),
            example_input=workload.calibration_wavs(),
            input=[ov.PartialShape([-1, -1])],
        )
        _write(path, model)


def _int8_path(fixed: bool, workload: Workload) -> Path:
    folder = workload.shape_folder() if fixed else workload.folder
    return folder / "nncf.xml"


def _quantize(fixed: bool, workload: Workload) -> None:
    import nncf
    import openvino as ov

    path = _int8_path(fixed, workload)
    if path.exists():
        return
    _convert(workload)
    model = ov.Core().read_model(_float_path(workload))
    wavs = workload.calibration_wavs(UTTERANCES)
    batches = list(wavs[:, None])
    if fixed:
        model.reshape(list(workload.wavs.shape))
        repeats = -(-workload.wavs.shape[1] // wavs.shape[1])
        samples = workload.wavs.shape[1]
        row = wavs.repeat(1, repeats)[:, :samples]
        batches = [
            w[None].expand(workload.options.batch, -1).contiguous() for w in row
        ]
    quantized = nncf.quantize(
        model,
        nncf.Dataset([b.numpy() for b in batches]),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    _write(path, quantized)


def _load(
    path: Path, fixed: bool, precision: str, workload: Workload
) -> Prepared:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    if fixed:
        model.reshape(list(workload.wavs.shape))
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": workload.options.threads,
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()

    def run(wavs: torch.Tensor) -> torch.Tensor:
        request.infer([wavs.numpy()], share_inputs=True)
        return torch.from_numpy(np.array(request.get_output_tensor(0).data))

    return Prepared(run, size_of(_paths(path)))


def _load_float(precision: str, workload: Workload) -> Prepared:
    return _load(_float_path(workload), True, precision, workload)


def _load_int8(fixed: bool, workload: Workload) -> Prepared:
    # What is left in floating point: as fast as the CPU can.
    precision = "bf16" if cpu_class().bf16 else "f32"
    path = _int8_path(fixed, workload)
    return _load(path, fixed, precision, workload)


def _float(precision: str) -> Executor:
    return Executor(partial(_load_float, precision), _convert, _float_path)


def _int8(fixed: bool) -> Executor:
    return Executor(
        partial(_load_int8, fixed),
        partial(_quantize, fixed),
        partial(_int8_path, fixed),
    )


CPU = {
    "openvino_fp32": _float("f32"),
    "openvino_bf16": _float("bf16"),
    "openvino_nncf_static": _int8(fixed=True),
    "openvino_nncf_dynamic": _int8(fixed=False),
}
