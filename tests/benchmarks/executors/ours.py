"""This project's runtimes, from a checkpoint of integers."""

from functools import partial

from models import Encoder, Recognizer
from torch import nn
from workload import Executor, Prepared, Workload, size_of

from speechbrain_stablequant.core.integer_layer import IntegerLayer
from speechbrain_stablequant.folder.encoder_config import (
    CONFIG_FILE,
    empty_encoder,
)
from speechbrain_stablequant.folder.stored_floats import fill_modules
from speechbrain_stablequant.folder.weights_file import (
    WEIGHTS_FILE,
    load_checkpoint,
)
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.runtimes.choice import choose_backend
from speechbrain_stablequant.utils.files import read_json


def integer_modules(
    workload: Workload,
) -> tuple[dict[str, nn.Module], dict[str, IntegerLayer], float | None]:
    """Modules of the quantized model without the weights of their integer
    layers, these, and the peak of its residual stream; as
    ``speechbrain_stablequant.inference`` does it, the float weights never
    exist."""
    folder = workload.integer_folder
    checkpoint = load_checkpoint(folder)
    config = read_json(folder / CONFIG_FILE, "encoder configuration")
    modules = {
        "wav2vec2": Encoder(empty_encoder(config)),
        "ctc_lin": nn.Linear(
            config["hidden_size"], config["vocab_size"], device="meta"
        ),
    }
    fill_modules(modules, checkpoint.integers, checkpoint.floats, str(folder))
    return modules, checkpoint.integers, checkpoint.plan.residual_amax


def _load(backend: str, workload: Workload, **options) -> Prepared:
    device = workload.options.device
    modules, integers, peak = integer_modules(workload)
    modules = {key: module.to(device) for key, module in modules.items()}
    forwards = build_forwards(
        choose_backend(backend, device)[0],
        modules,
        {k: v.to(device) for k, v in integers.items()},
        residual_amax=peak,
        **options,
    )
    for module, forward in forwards.items():
        module.forward = forward
    return Prepared(
        Recognizer(modules).eval(),
        size_of([workload.integer_folder / WEIGHTS_FILE]),
    )


CPU = {
    "ours_openvino": Executor(partial(_load, "openvino")),
    "ours_torch": Executor(partial(_load, "torch_int8")),
    "ours_onnx": Executor(partial(_load, "onnx")),
}
CUDA = {"ours_triton": Executor(partial(_load, "triton"))}
