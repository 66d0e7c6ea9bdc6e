"""Runs an encoder's OpenVINO graphs: one for each bucket of lengths."""

import logging
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from torch.nn import functional as F

from ..base import require_frame
from ..cpu import cpu_class
from ..encoder import EncoderSpec
from ..reference import valid_frame_mask
from ..time_norm import gain_and_shift
from .graph import GraphBuilder

logger = logging.getLogger(__name__)

#: What everything but the integer products may be computed in.
PRECISIONS = ("auto", "bf16", "f32")

#: Samples between the buckets of inputs up to 20 times as long; doubled for
#: inputs up to twice as long, and so on.
BUCKET_STEP = 4000
_STEPS = 20

#: Key of the graph of any shape.
_ANY = (-1, -1)


def bucket(samples: int) -> int:
    """The length that an input is padded to.

    Arguments
    ---------
    samples : int
        Length of the input.

    Returns
    -------
    int
        At most a tenth longer than an input of 2.5 s at 16 kHz or more, 3.5 %
        on average.

    Example
    -------
    >>> bucket(159_000), bucket(160_000), bucket(160_001)
    (160000, 160000, 176000)
    """
    step = BUCKET_STEP
    while samples > _STEPS * step:
        step *= 2
    return -(-samples // step) * step


def _array(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().numpy()


class OpenVINOExecutor:
    """Executes an encoder.

    The first ``max_models`` shapes each get a graph of their own, which is
    faster and holds a copy of the weights; all others share one graph
    of any shape.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    threads : int or None
        Threads; None for as many as torch uses.
    cache_folder : str, Path or None
        Where compiled graphs are kept for the next process, each as large as
        the integer weights; None for nowhere.
    max_models : int
        Graphs of fixed shape, 0 for none.
    precision : str
        Of everything but the integer products: ``"bf16"``, ``"f32"``, or
        ``"auto"`` for bf16 where the CPU multiplies it.

    Raises
    ------
    ValueError
        Another precision.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        threads: int | None = None,
        cache_folder: str | Path | None = None,
        max_models: int = 3,
        precision: str = "auto",
    ):
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision: '{precision}' is none of {', '.join(PRECISIONS)}"
            )
        if precision == "auto":
            precision = "bf16" if cpu_class().bf16 else "f32"
        self.spec = spec
        self.max_models = max_models
        self._core = ov.Core()
        if cache_folder is not None:
            self._core.set_property({"CACHE_DIR": str(cache_folder)})
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": precision,
        }
        self._requests: dict[tuple[int, int], ov.InferRequest] = {}

    def compile(self, batch: int, samples: int) -> ov.CompiledModel:
        """Compiles a graph.

        Arguments
        ---------
        batch, samples : int
            Its shape; -1 for any.

        Returns
        -------
        openvino.CompiledModel
        """
        model = GraphBuilder(self.spec, batch, samples).build()
        return self._core.compile_model(model, "CPU", self._settings)

    def _request(self, batch: int, samples: int) -> ov.InferRequest:
        key = (batch, samples)
        fixed = len(self._requests) - (_ANY in self._requests)
        if key not in self._requests and fixed >= self.max_models:
            key = _ANY
        if key not in self._requests:
            logger.info("compiling for batch %d, %d samples (-1: any)", *key)
            self._requests[key] = self.compile(*key).create_infer_request()
        return self._requests[key]

    @torch.no_grad()
    def __call__(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encodes a batch.

        Arguments
        ---------
        wavs : torch.Tensor
            float32 [batch, samples].
        lengths : torch.Tensor or None
            int64 [batch], real samples; None: all.

        Returns
        -------
        torch.Tensor
            float32 [batch, frames, channels].

        Raises
        ------
        ValueError
            An input too short for one frame.
        """
        spec = self.spec
        wavs = wavs.detach().float().cpu()
        batch, samples = wavs.shape
        frames = spec.frames(samples)
        require_frame(frames, samples)
        size = bucket(samples)
        if lengths is None:
            lengths = torch.full((batch,), samples)
        keep = valid_frame_mask(spec, lengths.cpu(), spec.frames(size))
        inputs = {
            "wave": _array(F.pad(wavs, (0, size - samples))[:, None]),
            "keep": _array(keep[:, :, None].float()),
        }
        first = spec.convs[0]
        if first.norm is not None and first.norm.over_time:
            gain, shift = gain_and_shift(first, wavs)
            inputs["gain"] = _array(gain[:, :, None])
            inputs["shift"] = _array(shift[:, :, None])
        request = self._request(batch, size)
        request.infer(inputs, share_inputs=True)
        hidden = request.get_output_tensor(0).data[:, :frames]
        return torch.from_numpy(hidden.copy())


def make_executor(
    spec: EncoderSpec,
    threads: int | None = None,
    cache_folder: str | Path | None = None,
    max_models: int = 3,
    precision: str = "auto",
) -> OpenVINOExecutor:
    """The runtime's entry, see :class:`OpenVINOExecutor`.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    threads : int or None
        Threads.
    cache_folder : str, Path or None
        Where compiled graphs are kept.
    max_models : int
        Graphs of fixed shape.
    precision : str
        Of everything but the integer products.

    Returns
    -------
    OpenVINOExecutor
    """
    return OpenVINOExecutor(spec, threads, cache_folder, max_models, precision)
