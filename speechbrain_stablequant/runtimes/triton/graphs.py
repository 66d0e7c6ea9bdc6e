"""CUDA graphs by shape, in memory that is bounded.

Graphs of one *generation* share a memory pool, an input buffer and an output
buffer, all sized by the largest shape, which is captured first: what a smaller
one needs lies inside. A larger shape begins a new generation.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from ...utils.timing import PREPARATION

#: Batch and samples of a bucket.
Shape = tuple[int, int]


class Memory(Protocol):
    """Where graphs are captured."""

    def capture(self, shape: Shape) -> Any:
        """Captures a graph; the first of a generation is its largest."""

    def used(self) -> int:
        """Bytes that the generation occupies."""

    def release(self, graphs: list[Any]) -> None:
        """Ends a generation, all graphs of which are given."""


class GraphCache:
    """The graphs last used, at most ``limit``, in at most ``max_bytes``.

    A discarded graph is kept aside until its generation ends: to destroy it
    frees cuBLAS workspaces that the others have captured.
    """

    def __init__(self, memory: Memory, limit: int, max_bytes: int):
        self.memory, self.limit, self.max_bytes = memory, limit, max_bytes
        self.graphs: OrderedDict[Shape, Any] = OrderedDict()
        self.aside: list[Any] = []
        self.largest = 0
        self.too_large: float = float("inf")

    def get(self, shape: Shape) -> Any | None:
        """The graph of a shape, captured if it is new; None if it does not
        fit."""
        if shape in self.graphs:
            self.graphs.move_to_end(shape)
            return self.graphs[shape]
        size = shape[0] * shape[1]
        if size >= self.too_large:
            return None
        if size > self.largest or len(self.aside) >= self.limit:
            self.clear()
            self.largest = size
        elif len(self.graphs) >= self.limit:
            self.aside.append(self.graphs.popitem(last=False)[1])
        self.graphs[shape] = self.memory.capture(shape)
        if self.memory.used() <= self.max_bytes:
            return self.graphs[shape]
        if size == self.largest:
            self.too_large = size
        self.clear()
        return None

    def clear(self) -> None:
        """Ends the generation."""
        graphs = [*self.graphs.values(), *self.aside]
        self.graphs.clear()
        self.aside.clear()
        self.largest = 0
        if graphs:
            self.memory.release(graphs)


class Inputs(NamedTuple):
    """What `Network` takes, of a fixed shape, such as of a captured graph."""

    wave: torch.Tensor  # float32 [batch, samples of the bucket]
    samples: torch.Tensor  # int64 scalar
    lengths: torch.Tensor  # int64 [batch]

    @classmethod
    def empty(cls, shape: Shape, device: torch.device) -> "Inputs":
        """Allocates silence of a shape."""
        batch, samples = shape
        return cls(
            torch.zeros((batch, samples), device=device),
            torch.full((), samples, device=device),
            torch.full((batch,), samples, device=device),
        )

    def of_shape(self, shape: Shape) -> "Inputs":
        """The same memory for a shape that is not larger."""
        batch, samples = shape
        wave = self.wave.flatten()[: batch * samples].view(shape)
        return self._replace(
            wave=wave, lengths=self.lengths.new_full((batch,), samples)
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


class CudaMemory:
    """Captures graphs of a network on a stream that nothing else uses."""

    def __init__(
        self, network: Callable[[Inputs], torch.Tensor], device: torch.device
    ):
        self.network, self.device = network, device
        self.side = torch.cuda.Stream(device)
        self.inputs: Inputs | None = None
        self.output: torch.Tensor | None = None
        self.pool: tuple[int, int] | None = None

    def _begin(self, shape: Shape) -> None:
        """A generation whose largest shape is given."""
        self.pool = torch.cuda.graph_pool_handle()
        self.inputs = Inputs.empty(shape, self.device)
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            # A warm-up loads kernels and allocates workspaces of libraries,
            # which must not happen during the capture.
            self.output = torch.empty_like(self.network(self.inputs))
        current.wait_stream(self.side)

    @PREPARATION.running(torch.cuda.synchronize)
    def capture(self, shape: Shape) -> Capture:
        if self.inputs is None:
            self._begin(shape)
        inputs, graph = self.inputs.of_shape(shape), torch.cuda.CUDAGraph()
        # "thread_local" lets other threads use CUDA, such as a loader's
        # thread that pins memory.
        with torch.cuda.graph(
            graph, self.pool, self.side, capture_error_mode="thread_local"
        ):
            output = self.network(inputs)
            if output.numel() <= self.output.numel():
                # left in the pool, it would take memory from the next graph
                place = self.output.flatten()[: output.numel()]
                output = place.view(output.shape).copy_(output)
        return Capture(inputs, graph, output)

    def used(self) -> int:
        pooled = sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self.pool)
        )
        return pooled + self.inputs.wave.nbytes + self.output.nbytes

    def release(self, graphs: list[Capture]) -> None:
        torch.cuda.synchronize(self.device)
        for capture in graphs:
            capture.graph.reset()
        self.inputs = self.output = self.pool = None
        torch.cuda.empty_cache()


class Graphs:
    """Runs batches on the graphs of their shapes, one after the other whatever
    their streams."""

    def __init__(self, cache: GraphCache, event: Callable[[], Any]):
        self.cache = cache
        self.done = event()

    def __call__(
        self,
        shape: Shape,
        wavs: torch.Tensor,
        lengths: torch.Tensor | None,
        frames: int,
    ) -> torch.Tensor | None:
        """The first frames of a batch's result, in their own memory; None if
        its graph does not fit."""
        capture = self.cache.get(shape)
        if capture is None:
            return None
        # another stream may still read the buffers
        self.done.wait()
        capture.inputs.fill(wavs, lengths)
        capture.graph.replay()
        out = capture.output[:, :frames].to(torch.float32, copy=True)
        self.done.record()
        return out


def cuda_graphs(
    network: Callable[[Inputs], torch.Tensor],
    device: torch.device,
    limit: int,
    max_bytes: int,
) -> Graphs:
    """The graphs of a network on a device."""
    cache = GraphCache(CudaMemory(network, device), limit, max_bytes)
    return Graphs(cache, torch.cuda.Event)
