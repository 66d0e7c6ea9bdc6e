"""ONNX Runtime: executes the exported graph.

Activations are uint8 with zero point 128, the form that ONNX Runtime fuses into
``MatMulIntegerToFloat``; with int8 an x86 CPU computes most products in
float32.
"""

import importlib
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...core.encoder_spec import EncoderSpec
from ...utils import forks
from ..base import require_frame
from .model import export_onnx

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def onnxruntime() -> ModuleType:
    """The package, without its telemetry, which has threads: a forked process
    waits for them at its end."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return importlib.import_module("onnxruntime")


def open_session(
    path: str | Path | bytes, threads: int | None = None, provider: str = "cpu"
) -> Any:
    """Open an ONNX file, or its bytes, with one of ``PROVIDERS``."""
    ort = onnxruntime()
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise ValueError(
            f"provider: this build of onnxruntime has no {provider}; install "
            "onnxruntime-gpu or write provider: cpu"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    file = path if isinstance(path, bytes) else str(path)
    return ort.InferenceSession(file, options, [PROVIDERS[provider]])


class OnnxExecutor:
    """Executes an encoder in ONNX Runtime; ``threads`` per operator."""

    def __init__(
        self,
        spec: EncoderSpec,
        threads: int | None = None,
        provider: str = "cpu",
    ):
        self._pid, self.session = os.getpid(), None
        self._frames = spec.frames
        # The session keeps its own copy of the weights, not the file.
        with tempfile.TemporaryDirectory(prefix="stablequant-") as folder:
            path = export_onnx(Path(folder) / "encoder.onnx", spec)
            self.session = open_session(path, threads, provider)

    def __del__(self):
        forks.keep_in_child(self._pid, self.session)

    def __call__(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode a batch, see :class:`..base.EncoderExecutor`."""
        batch, samples = wavs.shape
        require_frame(self._frames(samples), samples)
        if lengths is None:
            lengths = torch.full((batch,), samples)
        real = lengths.cpu().to(torch.int64).numpy()
        wave = wavs.detach().float().cpu().contiguous().numpy()
        (out,) = self.session.run(None, {"wave": wave, "lengths": real})
        return torch.from_numpy(out).to(wavs.device)
