"""Executes an encoder on CUDA: buckets of lengths, one CUDA graph for each."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...model.encoder_spec import EncoderSpec
from ...utils.store import machine_store
from ...utils.timing import PREPARATION
from .buckets import LeastRecent, bucket_samples
from .kernels.trial import failure_on_card, kernels_digest
from .kernels.tuning import Tuner
from .network import Network

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
#: Compute capability of the first cards with these integer instructions.
MIN_CAPABILITY = (8, 0)
#: Shapes that are remembered as seen once, before which nothing is captured.
MAX_SEEN = 4096


@dataclass
class Inputs:
    """Inputs of a fixed shape; a captured graph reads them where they are.

    Arguments
    ---------
    wave : torch.Tensor
        float32 [batch, samples of the bucket].
    samples : torch.Tensor
        int64 scalar, see :class:`~.network.Network`.
    lengths : torch.Tensor
        int64 [batch].
    """

    wave: torch.Tensor
    samples: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def empty(cls, batch: int, samples: int, device: torch.device) -> "Inputs":
        """Memory for inputs of a shape."""
        return cls(
            torch.zeros((batch, samples), device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def fill(self, wavs: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Takes over a batch and pads it. Nothing here waits for the device."""
        samples = wavs.shape[1]
        self.wave[:, :samples].copy_(wavs)
        self.wave[:, samples:].zero_()
        self.samples.fill_(samples)
        if lengths is None:
            self.lengths.fill_(samples)
        else:
            self.lengths.copy_(lengths)


@dataclass
class Capture:
    """A captured graph with the memory that it reads and writes."""

    inputs: Inputs
    graph: "torch.cuda.CUDAGraph" = field(repr=False)
    output: torch.Tensor = field(repr=False)


class Graphs:
    """CUDA graphs by shape, with scratch memory in common.

    A graph's output is valid until another one runs. What was used least
    recently goes first.

    Arguments
    ---------
    network : callable
        Runs on the tensors of `Inputs`.
    device : torch.device
        A CUDA device.
    limit : int
        How many to keep.
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
        # A pool dies with the last graph that uses it and cannot be used
        # again. An empty graph keeps it.
        self._holder = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self._capturing(self._holder):
                pass

    def _capturing(self, graph: "torch.cuda.CUDAGraph"):
        # Other threads, such as one that pins a loader's memory, may go on.
        return torch.cuda.graph(
            graph,
            pool=self.pool,
            stream=self.side,
            capture_error_mode="thread_local",
        )

    def _discard(self, capture: Capture) -> None:
        torch.cuda.synchronize(self.device)
        capture.graph.reset()

    def _capture(self, key: tuple[int, int]) -> Capture:
        inputs = Inputs.empty(*key, self.device)
        inputs.samples.fill_(key[1])
        inputs.lengths.fill_(key[1])
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            # Once for all that must not happen during the capture: loading
            # of kernels, workspaces of libraries.
            self.network(inputs)
        current.wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        with self._capturing(graph):
            output = self.network(inputs)
        return Capture(inputs, graph, output)

    def _prepared(self, key: tuple[int, int]) -> Capture:
        with PREPARATION.running(torch.cuda.synchronize):
            return self._capture(key)

    def __call__(
        self,
        key: tuple[int, int],
        wavs: torch.Tensor,
        lengths: torch.Tensor | None,
    ) -> torch.Tensor:
        """The network's output for a batch, by the graph of its shape."""
        capture = self.kept.get(key, self._prepared)
        capture.inputs.fill(wavs, lengths)
        capture.graph.replay()
        return capture.output


class TritonExecutor:
    """Executes an encoder with int8 kernels in Triton.

    An input is padded to its bucket and the padding is not attended to, so
    that its result does not depend on the bucket. On CUDA the launches of a
    bucket are captured when it is met for the second time; the graphs share
    their scratch memory, and only the last used ones are kept. Threads take
    turns; one that uses a stream of its own has to wait for the result on it.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    device : torch.device
        Where it runs.
    dtype : torch.dtype
        Of the residual stream and of the attention.
    max_graphs : int
        CUDA graphs to keep; 0 launches kernel by kernel.
    tuner : Tuner or None
        Chooses the tiles; None: they are chosen by rule.
    """

    # The generator that graphs share must not be made in inference mode.
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
        arguments = (inputs.wave, inputs.samples, inputs.lengths)
        if self.tuner is None:
            return self.network(*arguments)
        with self.tuner.active():
            out = self.network(*arguments)
        self.tuner.save()
        return out

    def _met(self, key: tuple[int, int]) -> bool:
        """Whether a shape was met before; notes it."""
        if key in self._seen:
            return True
        if len(self._seen) >= MAX_SEEN:
            self._seen.clear()
        self._seen.add(key)
        return False

    # Tensors made in inference mode could not be filled outside of it.
    @torch.inference_mode(False)
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
            int64 [batch], real samples; None: no mask.

        Returns
        -------
        torch.Tensor
            float32 [batch, frames, channels].

        Raises
        ------
        ValueError
            The input is on another device, or shorter than a frame.
        """
        if wavs.device != self.device:
            raise ValueError(
                f"backend triton: the encoder is on {self.device}, the audio "
                f"on {wavs.device}; move one of them"
            )
        batch, samples = wavs.shape
        frames = self.spec.frames(samples)
        if frames == 0:
            raise ValueError(
                f"backend triton: {samples} samples are shorter than "
                "one frame; drop such utterances"
            )
        key = (batch, bucket_samples(self.spec, samples))
        on_cuda = self.device.type == "cuda"
        place = torch.cuda.device(self.device) if on_cuda else _NOWHERE
        with self._turn, place:
            met = self._met(key)
            if self.graphs is not None and met:
                out = self.graphs(key, wavs, lengths)
            else:
                inputs = Inputs.empty(*key, self.device)
                inputs.fill(wavs, lengths)
                if on_cuda and not met:
                    # compiles, and measures tiles
                    with PREPARATION.running(torch.cuda.synchronize):
                        self._run(inputs)
                out = self._run(inputs)
            # a copy: the next replay overwrites the graph's output
            return out[:, :frames].to(torch.float32, copy=True)


_NOWHERE = contextlib.nullcontext()


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why a CUDA device cannot run the kernels, or None if it can.

    Arguments
    ---------
    device : torch.device
        A CUDA device that is there.

    Returns
    -------
    str or None
    """
    card = torch.cuda.get_device_name(device)
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        return (
            f"{card} has compute capability {found[0]}.{found[1]}, 8.0 or "
            "more is needed; use backend: torch"
        )
    failure = failure_on_card(device, card, machine_store("triton"))
    if failure is None:
        return None
    return f"{failure} (tried on {card}); use backend: torch, and report it"


def check_device(device: torch.device) -> None:
    """Raises unless a CUDA device can run the kernels."""
    reason = why_not(device)
    if reason is not None:
        raise ValueError(f"backend triton: {reason}")


def make_tuner(
    device: torch.device,
    tune: bool,
    cache: str | Path | None,
    make: Callable[..., Tuner] = Tuner,
) -> Tuner | None:
    """The tuner of a device; None where nothing can be measured."""
    if not tune or device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if cache is None:
        import triton

        # other kernels have other tiles
        version = f"{triton.__version__}-{kernels_digest()[:8]}"
        file = f"{name}-{version}.json".replace(" ", "_").replace("/", "_")
        store = machine_store("triton")
        return make((store.folder or Path()) / file, name, store=store)
    return make(cache, name)
