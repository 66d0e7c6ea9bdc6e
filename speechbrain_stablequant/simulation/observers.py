"""Histograms of |input| of each layer in one pass, without padding."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..core.histogram import Histogram
from ..model.encoders import conv_frames
from ..model.layer import Layer
from ..model.layers import visible_layers
from ..utils.distributed import gathered
from ..utils.patching import hooked


def real_frames(
    x: torch.Tensor,
    time_axis: int,
    total: int,
    lengths: Sequence[int],
    geometry: Sequence[tuple[int, int]],
) -> list[int] | None:
    """The real frames of each utterance in a layer's input.

    Behind the first convolutions of ``geometry`` that give as many, else a
    fraction of the samples; None if there is no padding or no time.
    """
    padded = any(n < total for n in lengths)
    if not padded or x.dim() != 3 or x.shape[0] != len(lengths):
        return None
    frames = x.shape[time_axis]
    for depth in range(len(geometry) + 1):
        before = geometry[:depth]
        if conv_frames(total, before) == frames:
            return [conv_frames(n, before) for n in lengths]
    return [min(frames, max(n * frames // total, 1)) for n in lengths]


class ResidualPeak:
    """The largest |x| in the residual streams of encoders: what the norms of
    their blocks take, and the one behind them."""

    def __init__(self, encoders: Iterable[nn.Module]):
        self.norms = [
            module
            for encoder in encoders
            for module in encoder.modules()
            if isinstance(module, nn.LayerNorm)
        ]
        self.value: float | None = None

    @contextmanager
    def watch(self) -> Iterator["ResidualPeak"]:
        with hooked((norm, self._hook) for norm in self.norms):
            yield self

    def _hook(self, module: nn.Module, args: tuple) -> None:
        self.value = max(self.value or 0.0, float(args[0].abs().max()))

    def join(self) -> None:
        """Takes the largest of all processes."""
        values = [x for x in gathered(self.value) if x is not None]
        self.value = max(values, default=None)


class Observer:
    """Collects a histogram for each layer while a model runs."""

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
        """Sets the padded and the real samples of the next forward pass."""
        self._total, self._lengths = total, list(lengths)

    @contextmanager
    def watch(self) -> Iterator["Observer"]:
        hooks = ((layer.module, self._hook(layer)) for layer in self.layers)
        with visible_layers(self.layers), hooked(hooks):
            yield self

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
        frames = real_frames(
            x, time_axis, self._total, self._lengths, self.geometry
        )
        if frames is None:
            histogram.add(x)
            return
        for row, count in zip(x, frames, strict=True):
            histogram.add(row.narrow(time_axis - 1, 0, count))

    def join(self) -> None:
        for name, histogram in self.histograms.items():
            parts = gathered(histogram)
            for part in parts[1:]:
                parts[0].merge(part)
            self.histograms[name] = parts[0]

    def check_all_called(self) -> None:
        """A layer that was never called must not count as quantized."""
        for layer in self.layers:
            if self.histograms[layer.name].count == 0:
                raise ValueError(
                    f"{layer.name}: was never called while calibrating; "
                    "add it to quantize.exclude"
                )
