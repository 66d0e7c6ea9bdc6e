"""The machine, libraries and precision that a run's figures depend on."""

import platform
from importlib.metadata import version

import torch

from ..runtimes.cpu import cpu_class, cpu_name
from ..utils import distributed
from ..utils.precision import allows_tf32

# SpeechBrain's names of precisions.
_ARITHMETIC = {
    "fp32": "float32",
    "fp16": "autocast to float16",
    "bf16": "autocast to bfloat16",
}


def environment(
    device: str, precision: str | None = None
) -> dict[str, str | int]:
    """Describe a device and SpeechBrain's ``eval_precision`` (default fp32)."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "speechbrain": version("speechbrain"),
        "cpu": cpu_name(),
        "cpu class": cpu_class().name,
        "threads": torch.get_num_threads(),
        "device": device,
        "processes": distributed.size(),
        "float arithmetic": _ARITHMETIC[precision or "fp32"],
    }
    if device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name(device)
        allowed = zip(("products", "convolutions"), allows_tf32(), strict=True)
        found["TF32"] = " and ".join(n for n, yes in allowed if yes) or "off"
        found["CUDA"] = str(torch.version.cuda)
    return found
