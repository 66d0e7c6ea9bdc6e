"""Windows of convolutions: what enters the graph, and products with them."""

from dataclasses import replace

import numpy as np
import torch

from ...core.encoder_spec import EncoderSpec
from ...core.integer_layer import AnyLayer
from ..algorithms import CONVOLUTION, window_rows


def flat_windows(layer: AnyLayer) -> AnyLayer:
    """A convolution as a product with flattened windows."""
    rows = window_rows(layer.weight)
    return replace(layer, kind="linear", weight=rows, groups=1)


def strides_of(layer: AnyLayer) -> int:
    """Number of strides that a convolution's window spans."""
    return -(-layer.weight.shape[2] // layer.stride)


def channels_first(spec: EncoderSpec) -> bool:
    """Whether the feature extractor computes [batch, channels, time]: its
    convolutions by those of the library, without a transposition between."""
    return all(
        stage.conv.algorithm == CONVOLUTION
        and (stage.norm is None or stage.norm.over_time)
        for stage in spec.convs
    )


def first_inputs(
    spec: EncoderSpec, wavs: torch.Tensor, frames: int
) -> np.ndarray:
    """Windows of the first convolution, float32 [batch, windows, kernel], or
    [batch, kernel, windows] if :func:`channels_first`, zero-padded at the end
    to give ``frames`` frames."""
    conv = spec.convs[0].conv
    batch, samples = wavs.shape
    kernel = conv.weight.shape[2]
    windows = frames
    for stage in reversed(spec.convs[1:]):  # these take whole strides
        windows = (windows + strides_of(stage.conv) - 1) * stage.conv.stride
    needed = (windows - 1) * conv.stride + kernel
    # By numpy: torch's threads would spin and take cores from OpenVINO's.
    padded = np.zeros((batch, needed), np.float32)
    padded[:, : min(samples, needed)] = wavs.numpy()[:, :needed]
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, 1)
    views = views[:, :: conv.stride]
    if channels_first(spec):
        views = views.swapaxes(1, 2)
    return np.ascontiguousarray(views)
