"""The memory and the order of CUDA graphs, simulated."""

import itertools
import random

import pytest
import torch

from speechbrain_stablequant.runtimes.base import round_frames
from speechbrain_stablequant.runtimes.triton.graphs import (
    Capture,
    GraphCache,
    Graphs,
    Inputs,
)

MB = 2**20


class Allocator:
    """A private pool of torch's caching allocator: blocks of 512 bytes, the
    smallest free one that fits, split if more than 1 MB is left, joined with
    free neighbors when it is freed."""

    def __init__(self):
        self.segments: list[list[list]] = []  # rows of [size, is free]

    def allocate(self, size: int) -> list:
        size = -(-size // 512) * 512
        small = size <= MB
        fitting = [
            (block[0], i, j)
            for i, row in enumerate(self.segments)
            for j, block in enumerate(row)
            if block[1]
            and block[0] >= size
            # small and large blocks lie in segments of their own
            and (sum(b[0] for b in row) == 2 * MB) == small
        ]
        if not fitting:
            large = 20 * MB if size < 10 * MB else -(-size // (2 * MB)) * 2 * MB
            self.segments.append([[2 * MB if small else large, True]])
            fitting = [(0, len(self.segments) - 1, 0)]
        _, i, j = min(fitting)
        row = self.segments[i]
        block = row[j]
        left = block[0] - size
        if left >= 512 if small else left > MB:
            row.insert(j + 1, [left, True])
            block[0] = size
        block[1] = False
        return block

    def free(self, block: list) -> None:
        block[1] = True
        for row in self.segments:
            for j in range(len(row) - 1, 0, -1):
                if row[j][1] and row[j - 1][1]:
                    row[j - 1][0] += row.pop(j)[0]

    def reserved(self) -> int:
        return sum(block[0] for row in self.segments for block in row)


def forward(allocator: Allocator, batch: int, samples: int) -> None:
    """What a forward of HuBERT-Large allocates and frees, in its order."""
    x, frames = None, samples
    for kernel, stride in zip(
        (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True
    ):
        frames = (frames - kernel) // stride + 1
        y = allocator.allocate(batch * frames * 512)
        if x is not None:
            allocator.free(x)
        x = y
    rows, old = batch * frames, x
    stream = allocator.allocate(rows * 1024 * 2)
    allocator.free(old)

    def through(*widths: int) -> None:
        """Layers, each of which needs the result of the one before."""
        before = None
        for width in widths:
            after = allocator.allocate(rows * width)
            if before is not None:
                allocator.free(before)
            before = after
        allocator.free(before)

    for _ in range(2):
        # norm, projections, attention; norm and the wide layer
        through(1024, 3 * 1024 * 2, 1024)
        new = allocator.allocate(rows * 1024 * 2)
        allocator.free(stream)
        stream = new
        through(1024, 4096)
    out = allocator.allocate(rows * 1024 * 2)
    allocator.free(stream)
    allocator.free(out)


class SimulatedMemory:
    """Captures in a pool of one generation."""

    def __init__(self):
        self.peak, self.released, self.count = 0, 0, itertools.count()
        self.release([])

    def capture(self, shape):
        if not self.buffers:
            batch, samples = shape
            self.buffers = batch * samples * 4 + batch * samples // 320 * 2048
        forward(self.pool, *shape)
        self.peak = max(self.peak, self.used())
        return next(self.count)

    def used(self):
        return self.pool.reserved() + self.buffers

    def release(self, graphs):
        self.released += len(graphs)
        self.pool, self.buffers = Allocator(), 0


def buckets() -> list[tuple[int, int]]:
    """Shapes of 32 utterances of 1 to 30 s."""
    frames = {round_frames(50 * seconds) for seconds in range(1, 31)}
    return [(32, 320 * n + 80) for n in sorted(frames)]


def simulate(shapes, limit=48, max_bytes=10**11):
    memory = SimulatedMemory()
    cache = GraphCache(memory, limit, max_bytes)
    for shape in shapes:
        cache.get(shape)
    return memory, cache


def test_one_pool_filled_in_ascending_order_would_grow():
    """What this policy is for: each longer graph takes new memory."""
    ascending = SimulatedMemory()
    for shape in buckets():
        ascending.capture(shape)
    (alone, _) = simulate(buckets()[-1:])
    assert ascending.peak > 4 * alone.peak


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_memory_is_that_of_the_longest_graph(order):
    shapes = buckets()
    if order == "descending":
        shapes.reverse()
    if order == "shuffled":
        random.Random(0).shuffle(shapes)
    alone, _ = simulate(buckets()[-1:])
    memory, cache = simulate(shapes + shapes)
    assert memory.peak <= 1.25 * alone.peak
    assert len(cache.graphs) == len(shapes)


def test_memory_is_bounded():
    shapes = buckets()
    bound = simulate(shapes[5:6])[0].peak
    memory, cache = simulate(3 * shapes, max_bytes=int(1.05 * bound))
    assert memory.used() <= 1.05 * bound
    assert set(cache.graphs) == set(shapes[:6])
    assert cache.get(shapes[-1]) is None
    # what fits is not given up for what does not
    assert set(cache.graphs) == set(shapes[:6])


def test_others_survive_what_is_discarded():
    shapes = [(1, 1000 - i) for i in range(5)]
    memory, cache = simulate(shapes[:3], limit=2)
    assert list(cache.graphs) == shapes[1:3]
    assert cache.get(shapes[1]) == 1
    # destroyed only with its generation
    assert memory.released == 0 and cache.aside == [0]
    cache.get(shapes[3])
    assert list(cache.graphs) == [shapes[1], shapes[3]]
    cache.get(shapes[4])
    assert memory.released == 4 and list(cache.graphs) == [shapes[4]]


class Device:
    """Runs what was launched only when it is waited for."""

    def __init__(self, waits=True):
        self.launched, self.waits = [], waits

    def wait(self):
        while self.waits and self.launched:
            self.launched.pop(0)()

    def record(self):
        pass

    def event(self):
        return self


class DeferredGraph:
    """A graph whose replay and whose result are computed later."""

    def __init__(self, device, inputs):
        self.device, self.inputs, self.results = device, inputs, []

    def replay(self):
        def compute():
            # samples that are real, twice
            self.results.append(2 * self.inputs.wave.clone())

        self.device.launched.append(compute)

    def __getitem__(self, _):
        return self

    def to(self, dtype, copy):
        return self.results


@pytest.mark.parametrize("waits", [True, False])
def test_inputs_are_not_overwritten_while_a_graph_reads_them(waits):
    """Two calls on streams of their own. Without the event, the first would
    compute with what the second brought."""
    device, cpu = Device(waits), torch.device("cpu")
    inputs = Inputs.empty((2, 8), cpu)
    graph = DeferredGraph(device, inputs)

    class Cache:
        def get(self, shape):
            return Capture(inputs, graph, graph)

    run = Graphs(Cache(), device.event)
    first, second = torch.ones(2, 5), 3 * torch.ones(2, 6)
    run((2, 8), first, None, 1)
    run((2, 8), second, None, 1)
    device.waits = True
    device.wait()
    padded = torch.nn.functional.pad(2 * first, (0, 3))
    assert torch.equal(graph.results[0], padded) == waits
    assert graph.results[1][:, 5].unique().tolist() == [6.0]


def test_smaller_shapes_lie_in_the_same_buffer():
    large = Inputs.empty((4, 100), torch.device("cpu"))
    small = large.of_shape((2, 30))
    small.fill(torch.ones(2, 20), torch.tensor([20, 7]))
    assert small.wave.data_ptr() == large.wave.data_ptr()
    assert small.wave.sum() == 40 and small.lengths.tolist() == [20, 7]
    small.fill(torch.ones(2, 10), None)
    assert small.wave.sum() == 20 and small.lengths.tolist() == [10, 10]
