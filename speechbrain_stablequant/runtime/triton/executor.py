"""Executes an encoder on CUDA: buckets of lengths, one CUDA graph for each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...kernels.tuning import Tuner, cache_folder
from ..encoder import EncoderSpec
from .buckets import LeastRecent, bucket_samples
from .network import Network, convolved

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
#: Compute capability of the first cards with these integer instructions.
MIN_CAPABILITY = (8, 0)


@dataclass
class Inputs:
    """Inputs of a fixed shape; a captured graph reads them where they are.

    Arguments
    ---------
    wave : torch.Tensor
        float32 [batch, samples].
    frames : tuple of torch.Tensor
        int64 scalars, see :class:`~.network.Network`.
    real : torch.Tensor or None
        int64 [batch].
    """

    wave: torch.Tensor
    frames: tuple[torch.Tensor, ...]
    real: torch.Tensor | None

    def fill(self, other: "Inputs") -> None:
        """Takes over the values of other inputs of the same shape."""
        self.wave.copy_(other.wave)
        for mine, its in zip(self.frames, other.frames, strict=True):
            mine.copy_(its)
        if self.real is not None:
            self.real.copy_(other.real)


@dataclass
class Capture:
    """A captured graph with the memory that it reads and writes."""

    inputs: Inputs
    graph: "torch.cuda.CUDAGraph" = field(repr=False)
    output: torch.Tensor = field(repr=False)

    def replay(self, inputs: Inputs) -> torch.Tensor:
        """Runs the graph; the result is valid until another one runs."""
        self.inputs.fill(inputs)
        self.graph.replay()
        return self.output


class TritonExecutor:
    """Executes an encoder with int8 kernels in Triton.

    An input is padded to its bucket and the padding masked out, so that its
    result does not depend on the bucket. On CUDA the launches of a bucket are
    captured once; the graphs share their scratch memory, and only the last
    used ones are kept.

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
        if device.type == "cuda" and max_graphs > 0:
            self.graphs = LeastRecent(max_graphs, lambda c: c.graph.reset())
            self._pool = torch.cuda.graph_pool_handle()

    def _geometry(self) -> list[tuple[int, int]]:
        return [
            (stage.conv.weight.shape[-1], stage.conv.stride)
            for stage in self.spec.convs
        ]

    def _inputs(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None
    ) -> Inputs:
        """Pads a batch to its bucket."""
        batch, samples = wavs.shape
        padded = bucket_samples(self.spec, samples)
        wave = torch.zeros(
            (batch, padded), dtype=torch.float32, device=self.device
        )
        wave[:, :samples] = wavs
        counts, count = [], samples
        real = None
        if lengths is not None:
            real = lengths.to(self.device, torch.int64)
        elif padded != samples:
            real = torch.full((batch,), samples, device=self.device)
        for kernel, stride in self._geometry():
            count = convolved(count, kernel, stride)
            counts.append(torch.tensor(count, device=self.device))
            if real is not None:
                real = convolved(real, kernel, stride).clamp_(min=0)
        if real is not None:
            # softmax over nothing is not finite
            real.clamp_(min=1)
        return Inputs(wave, tuple(counts), real)

    def _run(self, inputs: Inputs) -> torch.Tensor:
        if self.tuner is None:
            return self.network(inputs.wave, inputs.frames, inputs.real)
        with self.tuner.active():
            out = self.network(inputs.wave, inputs.frames, inputs.real)
        self.tuner.save()
        return out

    def _capture(self, inputs: Inputs) -> Capture:
        """Runs once to compile and tune, then captures the launches."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._run(inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._run(inputs)
        return Capture(inputs, graph, output)

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
        if wavs.device.type != self.device.type:
            raise ValueError(
                f"backend triton: the encoder is on {self.device}, the audio "
                f"on {wavs.device}; move one of them"
            )
        frames = self.spec.frames(wavs.shape[1])
        if frames == 0:
            raise ValueError(
                f"backend triton: {wavs.shape[1]} samples are shorter than "
                "one frame; drop such utterances"
            )
        inputs = self._inputs(wavs, lengths)
        if self.graphs is None:
            out = self._run(inputs)
        else:
            key = (*inputs.wave.shape, inputs.real is not None)
            capture = self.graphs.get(key, lambda _: self._capture(inputs))
            out = capture.replay(inputs)
        # a copy: the next replay overwrites the graph's output
        return out[:, :frames].to(torch.float32, copy=True)


def check_capability(device: torch.device) -> None:
    """Raises unless a CUDA device has the instructions that kernels need."""
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        raise ValueError(
            f"backend triton: {torch.cuda.get_device_name(device)} has compute "
            f"capability {found[0]}.{found[1]}, 8.0 or more is needed; use "
            "backend: torch"
        )


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

        file = f"{name}-{triton.__version__}.json".replace(" ", "_")
        cache = cache_folder() / file.replace("/", "_")
    return make(cache, name)
