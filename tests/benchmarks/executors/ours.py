"""This project's runtimes, from a checkpoint of integers."""

from functools import partial

from models import Encoder, Recognizer
from torch import nn
from workload import Executor, Prepared, Workload, size_of

from speechbrain_stablequant.folder.encoder_config import (
    CONFIG_FILE,
    empty_encoder,
)
from speechbrain_stablequant.folder.fill_modules import fill_modules
from speechbrain_stablequant.folder.weights_file import (
    WEIGHTS_FILE,
    load_checkpoint,
)
from speechbrain_stablequant.runtimes.build import build_forwards
from speechbrain_stablequant.runtimes.choice import choose_backend
from speechbrain_stablequant.utils.files import read_json


def _load(backend: str, workload: Workload, **options) -> Prepared:
    """As ``speechbrain_stablequant.inference`` does it: the float weights of
    integer layers never exist."""
    folder = workload.integer_folder
    device = workload.options.device
    checkpoint = load_checkpoint(folder)
    config = read_json(folder / CONFIG_FILE, "encoder configuration")
    encoder = empty_encoder(config)
    width = config["hidden_size"]
    labels = config["vocab_size"]
    modules = {
        "wav2vec2": Encoder(encoder),
        "ctc_lin": nn.Linear(width, labels, device="meta"),
    }
    fill_modules(modules, checkpoint.integers, checkpoint.floats, str(folder))
    modules = {key: module.to(device) for key, module in modules.items()}
    forwards = build_forwards(
        choose_backend(backend, device)[0],
        modules,
        {k: v.to(device) for k, v in checkpoint.integers.items()},
        **options,
    )
    for module, forward in forwards.items():
        module.forward = forward
    return Prepared(
        Recognizer(modules).eval(), size_of([folder / WEIGHTS_FILE])
    )


CPU = {
    "ours_openvino": Executor(partial(_load, "openvino")),
    "ours_torch": Executor(partial(_load, "torch_int8")),
    "ours_onnx": Executor(partial(_load, "onnx")),
}
CUDA = {"ours_triton": Executor(partial(_load, "triton"))}
