"""Runs an encoder's OpenVINO graphs: one for all lengths, one for the same."""

import logging
from pathlib import Path

import numpy as np
import openvino as ov
import torch

from ..base import require_frame
from ..cpu import cpu_class
from ..encoder import EncoderSpec
from ..reference import valid_frame_mask
from ..time_norm import gain_and_shift
from ..timing import PREPARATION
from .graph import GraphBuilder, first_windows

logger = logging.getLogger(__name__)

#: What everything but the integer products may be computed in.
PRECISIONS = ("auto", "bf16", "f32")

#: Times in a row that a shape comes before it gets a graph of its own.
REPEATS = 3

#: Key of the graph of any shape.
_ANY = (-1, -1)


def _array(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().numpy()


def first_inputs(spec: EncoderSpec, wavs: torch.Tensor) -> np.ndarray:
    """Windows of the first convolution, with zeros after the end.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    wavs : torch.Tensor
        float32 [batch, samples].

    Returns
    -------
    numpy.ndarray
        float32 [batch, windows, kernel].
    """
    conv = spec.convs[0].conv
    batch, samples = wavs.shape
    kernel = conv.weight.shape[2]
    windows = first_windows(spec, spec.frames(samples))
    needed = (windows - 1) * conv.stride + kernel
    # By numpy: torch's threads would wait for more work, and keep a core
    # from OpenVINO's for milliseconds.
    padded = np.zeros((batch, needed), np.float32)
    padded[:, : min(samples, needed)] = wavs.numpy()[:, :needed]
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, 1)
    return np.ascontiguousarray(views[:, :: conv.stride])


class OpenVINOExecutor:
    """Executes an encoder.

    One graph is for any shape. A shape that comes ``REPEATS`` times in a row
    gets a graph of its own, which is a little faster and holds a copy of the
    weights.

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
        Graphs of one shape, 0 for none.
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
        max_models: int = 1,
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
        self._half = precision == "bf16"
        self._core = ov.Core()
        if cache_folder is not None:
            self._core.set_property({"CACHE_DIR": str(cache_folder)})
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": precision,
        }
        self._requests: dict[tuple[int, int], ov.InferRequest] = {}
        self._last, self._repeats = _ANY, 0

    def compile(self, batch: int, frames: int) -> ov.CompiledModel:
        """Compiles a graph.

        Arguments
        ---------
        batch, frames : int
            Of its output; -1 for any.

        Returns
        -------
        openvino.CompiledModel
        """
        builder = GraphBuilder(self.spec, batch, frames, self._half)
        model = builder.build()
        return self._core.compile_model(model, "CPU", self._settings)

    def _request(self, batch: int, frames: int) -> ov.InferRequest:
        key = (batch, frames)
        self._repeats = self._repeats + 1 if key == self._last else 1
        self._last = key
        own = len(self._requests) - (_ANY in self._requests)
        if key not in self._requests and (
            self._repeats < REPEATS or own >= self.max_models
        ):
            key = _ANY
        if key not in self._requests:
            logger.info("compiling for batch %d, %d frames (-1: any)", *key)
            with PREPARATION.running():
                compiled = self.compile(*key)
            self._requests[key] = compiled.create_infer_request()
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
        if lengths is None:
            lengths = torch.full((batch,), samples)
        keep = valid_frame_mask(spec, lengths.cpu(), frames)
        inputs = {
            "windows": first_inputs(spec, wavs),
            "keep": _array(keep[:, :, None].float()),
        }
        first = spec.convs[0]
        if first.norm is not None and first.norm.over_time:
            gain, shift = gain_and_shift(first, wavs)
            inputs["gain"] = _array(gain[:, None])
            inputs["shift"] = _array(shift[:, None])
        request = self._request(batch, frames)
        request.infer(inputs, share_inputs=True)
        hidden = request.get_output_tensor(0).data
        if self._half:  # which numpy has no type for
            hidden = torch.from_numpy(hidden.view(np.int16))
            return hidden.view(torch.bfloat16).float()
        return torch.from_numpy(hidden.copy())


def make_executor(
    spec: EncoderSpec,
    threads: int | None = None,
    cache_folder: str | Path | None = None,
    max_models: int = 1,
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
        Graphs of one shape.
    precision : str
        Of everything but the integer products.

    Returns
    -------
    OpenVINOExecutor
    """
    return OpenVINOExecutor(spec, threads, cache_folder, max_models, precision)
