"""Executes an encoder on CUDA, with one CUDA graph per bucket of lengths."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ...core.encoder_spec import EncoderSpec
from ...utils.store import Store, machine_store
from ...utils.timing import PREPARATION
from ..base import require_frame
from .buckets import LeastRecent, bucket_samples
from .kernels.trial import card_file, failure_on_card, kernels_digest
from .kernels.tuning import Tuner
from .network import Network

#: Lowest compute capability with the integer instructions of the kernels.
MIN_CAPABILITY = (8, 0)


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
    """Executes an encoder with int8 kernels in Triton; see `make_executor`.

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
        self.network = Network(spec, dtype, device)
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
        place = contextlib.nullcontext()
        if on_cuda:
            place = torch.cuda.device(self.device)
        with self._turn, place:
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


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why a CUDA device cannot run the kernels, or None if it can."""
    card = torch.cuda.get_device_name(device)
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        return (
            f"{card} has compute capability {found[0]}.{found[1]}, 8.0 or "
            "more is needed; use backend: torch"
        )
    failure = failure_on_card(device, card, machine_store("triton"))
    return failure and (
        f"{failure} (tried on {card}); use backend: torch, and report it"
    )


def check_device(device: torch.device) -> None:
    """Raises if a CUDA device cannot run the kernels."""
    reason = why_not(device)
    if reason is not None:
        raise ValueError(f"backend triton: {reason}")


def make_tuner(
    device: torch.device, tune: bool, cache: str | Path | None
) -> Tuner | None:
    """The tuner of a device, which remembers tiles in the file ``cache``, by
    default the user's; None without tuning or CUDA."""
    if not tune or device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(device)
    if cache is not None:
        return Tuner(Store(Path(cache).parent), Path(cache).name, card)
    # the best tiles change with the kernels
    version = f"{triton.__version__}-{kernels_digest()[:8]}"
    return Tuner(machine_store("triton"), card_file(card, version), card)
