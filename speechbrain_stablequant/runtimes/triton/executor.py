"""Executes an encoder on CUDA, with one CUDA graph per bucket of lengths."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from ...core.encoder_spec import EncoderSpec
from ...utils.timing import PREPARATION
from ..base import require_frame, round_frames
from .forms import Place
from .kernels.tuning import Tuner
from .network import Network


def samples_for(spec: EncoderSpec, frames: int) -> int:
    """Smallest number of samples that gives ``frames`` frames."""
    for stage in reversed(spec.convs):
        kernel = stage.conv.weight.shape[-1]
        frames = (frames - 1) * stage.conv.stride + kernel
    return frames


def bucket_samples(spec: EncoderSpec, samples: int) -> int:
    """Length to pad to: at most 12.5 % or 7 frames more than needed."""
    # samples behind the last frame may need one more frame
    frames = round_frames(spec.frames(samples))
    while samples_for(spec, frames) < samples:
        frames = round_frames(frames + 1)
    return samples_for(spec, frames)


class LeastRecent:
    """LRU cache that discards an item before it makes the next one."""

    def __init__(self, limit: int, discard: Callable[[Any], None]):
        self.limit = limit
        self.discard = discard
        self.items: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[Any], Any]) -> Any:
        """The item of a key, made if it is missing."""
        if key in self.items:
            self.items.move_to_end(key)
            return self.items[key]
        while len(self.items) >= self.limit:
            # not in a variable: its memory is free before the next one's
            self.discard(self.items.popitem(last=False)[1])
        self.items[key] = make(key)
        return self.items[key]


class Inputs(NamedTuple):
    """What `Network` takes, of a fixed shape, such as of a captured graph."""

    wave: torch.Tensor  # float32 [batch, samples of the bucket]
    samples: torch.Tensor  # int64 scalar
    lengths: torch.Tensor  # int64 [batch]

    @classmethod
    def empty(cls, batch: int, samples: int, device: torch.device) -> "Inputs":
        """Allocates silence of a shape."""
        return cls(
            torch.zeros((batch, samples), device=device),
            torch.full((), samples, device=device),
            torch.full((batch,), samples, device=device),
        )

    def fill(self, wavs: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Copies and pads a batch, without waiting for the device."""
        samples = wavs.shape[1]
        self.wave[:, :samples].copy_(wavs)
        self.wave[:, samples:].zero_()
        self.samples.fill_(samples)
        self.lengths.copy_(self.samples if lengths is None else lengths)


class Capture(NamedTuple):
    """A captured graph with its inputs and output."""

    inputs: Inputs
    graph: "torch.cuda.CUDAGraph"
    output: torch.Tensor


class Graphs:
    """LRU cache of CUDA graphs by shape, which share their scratch memory.

    A graph's output is valid until another one runs.
    """

    def __init__(
        self,
        network: Callable[[Inputs], torch.Tensor],
        device: torch.device,
        limit: int,
    ):
        self.network = network
        self.device = device
        self.kept = LeastRecent(limit, self._discard)
        self.side = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        # A pool is freed for good with the last graph that uses it; an empty
        # graph keeps it alive.
        self._holder = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self._capturing(self._holder):
                pass

    def _capturing(self, graph: "torch.cuda.CUDAGraph"):
        # "thread_local" lets other threads use CUDA, such as a loader's
        # thread that pins memory.
        return torch.cuda.graph(
            graph,
            pool=self.pool,
            stream=self.side,
            capture_error_mode="thread_local",
        )

    def _discard(self, capture: Capture) -> None:
        torch.cuda.synchronize(self.device)
        capture.graph.reset()

    @PREPARATION.running(torch.cuda.synchronize)
    def _capture(self, key: tuple[int, int]) -> Capture:
        inputs = Inputs.empty(*key, self.device)
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            # A warm-up loads kernels and allocates workspaces of libraries,
            # which must not happen during the capture.
            self.network(inputs)
        current.wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        with self._capturing(graph):
            output = self.network(inputs)
        return Capture(inputs, graph, output)

    def __call__(
        self,
        key: tuple[int, int],
        wavs: torch.Tensor,
        lengths: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs a batch on the graph of its shape, captured if it is new."""
        capture = self.kept.get(key, self._capture)
        capture.inputs.fill(wavs, lengths)
        capture.graph.replay()
        return capture.output


class TritonExecutor:
    """Executes an encoder with int8 kernels in Triton.

    An input is padded to its bucket; the padding is not attended to, so the
    result does not depend on the bucket. On CUDA a bucket is captured as a
    graph when it is seen for the second time. Threads take turns; a thread with
    a stream of its own has to wait for the result on it.
    """

    # Graphs share a generator, which must not be created in inference mode.
    @torch.inference_mode(False)
    def __init__(
        self,
        spec: EncoderSpec,
        device: torch.device,
        dtype: torch.dtype,
        max_graphs: int,
        tuner: Tuner | None,
    ):
        self.spec = spec
        self.device = device
        self.network = Network(spec, Place(device, dtype))
        self.tuner = tuner
        self.graphs = None
        self._seen: set[tuple[int, int]] = set()
        self._turn = threading.Lock()
        if device.type == "cuda" and max_graphs > 0:
            with torch.cuda.device(device):
                self.graphs = Graphs(self._run, device, max_graphs)

    def _run(self, inputs: Inputs) -> torch.Tensor:
        if self.tuner is None:
            return self.network(*inputs)
        with self.tuner.active():
            out = self.network(*inputs)
        self.tuner.save()
        return out

    # Tensors made in inference mode could not be refilled outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """float32 [batch, samples] to float32 [batch, frames, channels];
        ``lengths`` (int64 [batch]) are the real samples, None: no mask."""
        if wavs.device != self.device:
            raise ValueError(
                f"backend triton: the encoder is on {self.device}, the audio "
                f"on {wavs.device}; move one of them"
            )
        batch, samples = wavs.shape
        frames = self.spec.frames(samples)
        require_frame(frames, samples)
        key = (batch, bucket_samples(self.spec, samples))
        on_cuda = self.device.type == "cuda"
        # Without effect on a CPU.
        with self._turn, torch.cuda.device(self.device if on_cuda else -1):
            seen = key in self._seen
            self._seen.add(key)
            if self.graphs is not None and seen:
                out = self.graphs(key, wavs, lengths)
            else:
                inputs = Inputs.empty(*key, self.device)
                inputs.fill(wavs, lengths)
                if on_cuda and not seen:
                    # compiles kernels and measures tiles
                    with PREPARATION.running(torch.cuda.synchronize):
                        self._run(inputs)
                out = self._run(inputs)
            # a copy: the next replay overwrites the graph's output
            return out[:, :frames].to(torch.float32, copy=True)
