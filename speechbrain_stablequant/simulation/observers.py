"""One pass over data gives a histogram of |input| for each layer.

Padding never enters a histogram. A batch says how many samples of each
utterance are real; each layer sees another time resolution, so the number of
its real frames follows from the network's convolutions.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..core.histogram import Histogram
from ..model.layers import Layer
from ..utils.distributed import gathered


def conv_frames(samples: int, kernel: int, stride: int) -> int:
    """Output frames of an unpadded convolution that see no padding.

    Example
    -------
    >>> conv_frames(400, 10, 5)
    79
    """
    return max((samples - kernel) // stride + 1, 0)


def valid_frames(
    frames: int,
    total: int,
    lengths: Sequence[int],
    geometry: Sequence[tuple[int, int]] = (),
) -> list[int]:
    """How many frames of each utterance are real at some time resolution.

    Arguments
    ---------
    frames : int
        Frames of the padded batch at the layer's input.
    total : int
        Samples of the padded batch.
    lengths : sequence of int
        Real samples of each utterance.
    geometry : sequence of (int, int)
        Kernel and stride of the convolutions that lead from samples to
        frames. A resolution that none of them gives is taken as a plain
        fraction of the samples.

    Returns
    -------
    list of int
        Real frames of each utterance.

    Example
    -------
    >>> valid_frames(79, 400, [400, 200], [(10, 5)])
    [79, 39]
    >>> valid_frames(100, 400, [400, 200])
    [100, 50]
    """
    padded, real = total, list(lengths)
    for kernel, stride in (*geometry, (1, 1)):
        if frames == padded:
            return real
        padded = conv_frames(padded, kernel, stride)
        real = [conv_frames(n, kernel, stride) for n in real]
    return [min(frames, max(n * frames // total, 1)) for n in lengths]


class Observer:
    """Collects the histograms while a model runs.

    Arguments
    ---------
    layers : iterable of Layer
        The layers to watch.
    geometry : sequence of (int, int)
        Kernel and stride of the feature extractor's convolutions.
    num_bins : int
        Bins of each histogram.

    Example
    -------
    >>> linear = nn.Linear(2, 1)
    >>> observer = Observer([Layer("enc", linear, "linear", "head")])
    >>> with observer.watch():
    ...     observer.start_batch(total=4, lengths=[2])
    ...     _ = linear(torch.tensor([[[1.0, 2], [3, 4], [5, 6], [7, 8]]]))
    >>> observer.histograms["enc"].max
    4.0
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        geometry: Sequence[tuple[int, int]] = (),
        num_bins: int = 4096,
    ):
        self.layers = list(layers)
        self.geometry = tuple(geometry)
        self.histograms = {
            layer.name: Histogram(num_bins) for layer in self.layers
        }
        self.call_order: list[str] = []
        self._total = 0
        self._lengths: list[int] = []

    def start_batch(self, total: int, lengths: Sequence[int]) -> None:
        """Says what the next forward pass will see.

        Arguments
        ---------
        total : int
            Samples of the padded batch.
        lengths : sequence of int
            Real samples of each utterance.
        """
        self._total, self._lengths = total, list(lengths)

    @contextmanager
    def watch(self) -> Iterator["Observer"]:
        """Context in which forward passes are collected."""
        handles = [
            layer.module.register_forward_pre_hook(self._hook(layer))
            for layer in self.layers
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: Layer):
        histogram = self.histograms[layer.name]
        # [B, T, C] for a Linear, [B, C, T] for a convolution.
        time_axis = 1 if layer.kind == "linear" else 2

        def hook(module: nn.Module, args: tuple) -> None:
            if histogram.count == 0:
                self.call_order.append(layer.name)
            try:
                self._collect(histogram, args[0].detach(), time_axis)
            except ValueError as error:
                raise ValueError(f"layer {layer.name}: {error}") from error

        return hook

    def _collect(
        self, histogram: Histogram, x: torch.Tensor, time_axis: int
    ) -> None:
        padded = any(n < self._total for n in self._lengths)
        has_time = x.dim() == 3 and x.shape[0] == len(self._lengths)
        if not padded or not has_time:
            histogram.add(x)
            return
        frames = valid_frames(
            x.shape[time_axis], self._total, self._lengths, self.geometry
        )
        for row, count in zip(x, frames, strict=True):
            histogram.add(row.narrow(time_axis - 1, 0, count))

    def join(self) -> None:
        """Takes up what other processes have collected."""
        for name, histogram in self.histograms.items():
            parts = gathered(histogram)
            for part in parts[1:]:
                parts[0].merge(part)
            self.histograms[name] = parts[0]

    def check_all_called(self) -> None:
        """Raises when a layer was never called.

        Raises
        ------
        ValueError
            Names the first such layer: its weight is unused, or used behind
            the layer's back, and must not count as quantized.
        """
        for layer in self.layers:
            if self.histograms[layer.name].count == 0:
                raise ValueError(
                    f"{layer.name}: was never called while calibrating; "
                    "add it to quantize.exclude"
                )
