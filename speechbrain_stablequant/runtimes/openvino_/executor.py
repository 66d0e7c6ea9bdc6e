"""Runs an encoder's OpenVINO graph, which takes inputs of any length."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openvino as ov
import torch

from ...core.encoder_spec import EncoderSpec
from ...utils import forks
from ...utils.timing import PREPARATION
from ..base import require_frame
from ..cpu import cpu_class
from ..group_norm import gain_and_shift
from ..lengths import round_frames
from ..reference import valid_frame_mask
from .core import core
from .graph import GraphBuilder, first_windows

logger = logging.getLogger(__name__)

#: What everything but the integer products may be computed in.
PRECISIONS = ("auto", "bf16", "f32")

#: Lengths are padded to multiples of so many frames; 10 s give 499.
FRAME_UNIT = 10
#: From twice as many units on there are so many lengths before each doubling.
FRAME_STEPS = 24
#: Utterances in a product at most, a power of 2.
MAX_BATCH = 16
#: Entries of OpenVINO's cache of what it prepares for a shape. A shape takes
#: about 15 of them, so that the 86 lengths up to 30 s stay.
CACHE_CAPACITY = 2000


def _cores() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def batch_parts(batch: int) -> Iterator[slice]:
    """Cuts a batch into powers of 2, so that few sizes are computed.

    Arguments
    ---------
    batch : int
        Utterances.

    Returns
    -------
    iterator of slice

    Example
    -------
    >>> [(part.start, part.stop) for part in batch_parts(23)]
    [(0, 16), (16, 20), (20, 22), (22, 23)]
    """
    start = 0
    while start < batch:
        count = min(MAX_BATCH, 1 << (batch - start).bit_length() - 1)
        yield slice(start, start + count)
        start += count


def _array(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().numpy()


def first_inputs(
    spec: EncoderSpec, wavs: torch.Tensor, frames: int
) -> np.ndarray:
    """Windows of the first convolution, with zeros after the end.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    wavs : torch.Tensor
        float32 [batch, samples].
    frames : int
        Frames that the windows give; fewer or more than those of the samples.

    Returns
    -------
    numpy.ndarray
        float32 [batch, windows, kernel].
    """
    conv = spec.convs[0].conv
    batch, samples = wavs.shape
    kernel = conv.weight.shape[2]
    windows = first_windows(spec, frames)
    needed = (windows - 1) * conv.stride + kernel
    # By numpy: torch's threads would wait for more work, and keep a core
    # from OpenVINO's for milliseconds.
    padded = np.zeros((batch, needed), np.float32)
    padded[:, : min(samples, needed)] = wavs.numpy()[:, :needed]
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, 1)
    return np.ascontiguousarray(views[:, :: conv.stride])


class OpenVINOExecutor:
    """Executes an encoder.

    One graph computes inputs of any length, so the same input gives the same
    output, however often and in whatever order it comes. For each shape that
    it meets OpenVINO prepares something, and keeps it. That this stays within
    bounds, lengths are padded to a multiple of ``FRAME_UNIT`` frames or, from
    480 frames (9.6 s) on, to one of 24 lengths before each doubling: there are
    73 up to 20 s, 86 up to 30 s. Padding is masked, and no frame that is real
    depends on it. Batches are computed in parts of 16, 8, 4, 2 and 1. More
    shapes than fit into ``CACHE_CAPACITY`` push out those that were not used
    for the longest time.

    Any number of threads may call it at a time: each call has a request of
    its own. With ``threads`` given, as many calls are computed side by side
    as the CPU has room for, each by so many threads; otherwise one after the
    other, each by all threads.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    threads : int or None
        Threads of one call; None for as many as torch uses.
    cache_folder : str, Path or None
        Where compiled graphs are kept for the next process, each as large as
        the integer weights; None for nowhere.
    precision : str
        Of everything but the integer products: ``"bf16"``, ``"f32"``, or
        ``"auto"`` for bf16 where the CPU multiplies it.

    Raises
    ------
    ValueError
        Another precision.
    RuntimeError
        OpenVINO was used before this process was forked.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        threads: int | None = None,
        cache_folder: str | Path | None = None,
        precision: str = "auto",
    ):
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision: '{precision}' is none of {', '.join(PRECISIONS)}"
            )
        forks.use_in_one_process("openvino")
        if precision == "auto":
            precision = "bf16" if cpu_class().bf16 else "f32"
        self.spec = spec
        self._half = precision == "bf16"
        self._pid = os.getpid()
        # Taken from and put back to by single operations, which are atomic.
        self._idle: list[ov.InferRequest] = []
        self._compiled: ov.CompiledModel | None = None
        streams = max(_cores() // threads, 1) if threads else 1
        self.settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams
            * (threads or torch.get_num_threads()),
            "INFERENCE_PRECISION_HINT": precision,
            "CPU_RUNTIME_CACHE_CAPACITY": CACHE_CAPACITY,
            # Two processes would be pinned to the same cores, and leave the
            # others idle.
            "ENABLE_CPU_PINNING": False,
        }
        if cache_folder is not None:
            self.settings["CACHE_DIR"] = str(cache_folder)
        with PREPARATION.running():
            model = GraphBuilder(spec, self._half).build()
            self._compiled = core().compile_model(model, "CPU", self.settings)

    def __del__(self):
        if hasattr(self, "_compiled"):
            forks.keep_in_child(self._pid, self._compiled, *self._idle)

    @contextmanager
    def _request(self) -> Iterator[ov.InferRequest]:
        """A request that nobody else uses meanwhile."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        yield request
        # Not after an error: it may be in any state then.
        self._idle.append(request)

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
            float32 [batch, frames, channels], zero at padded frames.

        Raises
        ------
        ValueError
            An input too short for one frame.
        RuntimeError
            This process was forked from the one that made the executor.
        """
        forks.use_in_one_process("openvino")
        spec = self.spec
        wavs = wavs.detach().float().cpu()
        batch, samples = wavs.shape
        frames = spec.frames(samples)
        require_frame(frames, samples)
        if lengths is None:
            lengths = torch.full((batch,), samples)
        keep = valid_frame_mask(spec, lengths.cpu(), frames)
        norms = {}
        first = spec.convs[0]
        if first.norm is not None and first.norm.over_time:
            # The norm sees the padding of the batch, not that to a length.
            gain, shift = gain_and_shift(first, wavs)
            norms = {"gain": gain[:, None], "shift": shift[:, None]}
        width = spec.norm.weight.numel()
        hidden = torch.zeros(batch, frames, width)
        for part in batch_parts(batch):
            rows = {name: _array(x[part]) for name, x in norms.items()}
            out = self._run(wavs[part], keep[part], rows)
            hidden[part, : out.shape[1]] = out
        return hidden

    def _run(
        self,
        wavs: torch.Tensor,
        keep: torch.Tensor,
        inputs: dict[str, np.ndarray],
    ) -> torch.Tensor:
        """A part of a batch, up to the end of its longest utterance."""
        batch = len(wavs)
        frames = max(int(keep.sum(1).max()), 1)
        padded = round_frames(frames, FRAME_UNIT, FRAME_STEPS)
        mask = np.zeros((batch, padded, 1), np.float32)
        mask[:, :frames, 0] = keep[:, :frames].numpy()
        inputs["windows"] = first_inputs(self.spec, wavs, padded)
        inputs["keep"] = mask
        with self._request() as request:
            request.infer(inputs, share_inputs=True)
            hidden = request.get_output_tensor(0).data[:, :frames]
            if self._half:  # which numpy has no type for
                hidden = torch.from_numpy(hidden.view(np.int16).copy())
                return hidden.view(torch.bfloat16).float()
            # A copy: the next request overwrites it.
            return torch.from_numpy(hidden.copy())


def make_executor(
    spec: EncoderSpec,
    threads: int | None = None,
    cache_folder: str | Path | None = None,
    max_models: int | None = None,
    precision: str = "auto",
) -> OpenVINOExecutor:
    """The runtime's entry, see :class:`OpenVINOExecutor`.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    threads : int or None
        Threads of one call.
    cache_folder : str, Path or None
        Where compiled graphs are kept.
    max_models : int or None
        Has no effect; folders that were written before there was one graph
        for all lengths may hold it.
    precision : str
        Of everything but the integer products.

    Returns
    -------
    OpenVINOExecutor
    """
    if max_models is not None:
        logger.warning(
            "backend_options.max_models has no effect: one graph computes all "
            "lengths; leave it out"
        )
    return OpenVINOExecutor(spec, threads, cache_folder, precision)
