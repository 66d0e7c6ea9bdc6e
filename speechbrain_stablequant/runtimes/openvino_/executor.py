"""Runs an encoder's OpenVINO graph, which takes inputs of any length."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ...core.encoder_spec import EncoderSpec
from ...model.encoders import conv_samples
from ..base import require_frame, round_frames
from ..group_norm import gain_and_shift
from ..reference import valid_frame_mask
from . import OpenVinoOptions
from .core import CompiledGraph, output
from .graph import GraphBuilder, channels_first

logger = logging.getLogger(__name__)

#: Lengths are padded to multiples of this; 10 s give 499 frames.
FRAME_UNIT = 10
#: From twice as many units on: lengths before each doubling.
FRAME_STEPS = 16
#: Maximum batch of one call of the graph, a power of 2.
MAX_BATCH = 16


def batch_parts(batch: int) -> Iterator[slice]:
    """Split a batch into powers of 2, so that few sizes are computed."""
    start = 0
    while start < batch:
        count = min(MAX_BATCH, 1 << (batch - start).bit_length() - 1)
        yield slice(start, start + count)
        start += count


def first_inputs(
    spec: EncoderSpec, wavs: torch.Tensor, frames: int
) -> np.ndarray:
    """Windows of the first convolution, float32 [batch, windows, kernel], or
    [batch, kernel, windows] if :func:`channels_first`, zero-padded at the end
    to give ``frames`` frames."""
    conv = spec.convs[0].conv
    batch, samples = wavs.shape
    kernel = conv.weight.shape[2]
    needed = conv_samples(frames, spec.conv_geometry())
    # By numpy: torch's threads would spin and take cores from OpenVINO's.
    padded = np.zeros((batch, needed), np.float32)
    padded[:, : min(samples, needed)] = wavs.numpy()[:, :needed]
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, 1)
    views = views[:, :: conv.stride]
    if channels_first(spec):
        views = views.swapaxes(1, 2)
    return np.ascontiguousarray(views)


class OpenVINOExecutor(CompiledGraph):
    """Executes an encoder by one graph for inputs of any length.

    OpenVINO prepares and caches something for each shape it meets. To bound
    this, lengths are padded to a multiple of ``FRAME_UNIT`` frames or, from 320
    frames (6.4 s) on, to one of 16 lengths before each doubling: 57 lengths up
    to 20 s, 67 up to 30 s. Padding is masked, and no real frame depends on it.
    Batches are computed in parts of 16, 8, 4, 2 and 1. Shapes beyond
    the capacity of its cache evict the least recently used.
    """

    def __init__(self, spec: EncoderSpec, **options: Any):
        chosen = OpenVinoOptions(**options)
        if chosen.max_models is not None:
            logger.warning(
                "backend_options.max_models has no effect: one graph computes "
                "all lengths; leave it out"
            )
        super().__init__(chosen)
        self.spec = spec
        self.compile(GraphBuilder(spec, self._half).build())

    @torch.no_grad()
    def __call__(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As :class:`..base.EncoderExecutor`; padded frames are zero."""
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
            axis = 2 if channels_first(spec) else 1
            pair = (x.unsqueeze(axis) for x in gain_and_shift(first, wavs))
            norms = dict(zip(("gain", "shift"), pair, strict=True))
        hidden = torch.zeros(batch, frames, spec.norm.weight.numel())
        for part in batch_parts(batch):
            rows = {k: x[part].contiguous().numpy() for k, x in norms.items()}
            out = self._run(wavs[part], keep[part], rows)
            hidden[part, : out.shape[1]] = out
        return hidden

    def _run(
        self,
        wavs: torch.Tensor,
        keep: torch.Tensor,
        inputs: dict[str, np.ndarray],
    ) -> torch.Tensor:
        """Compute a part of a batch, up to the end of its longest utterance."""
        batch = len(wavs)
        frames = max(int(keep.sum(1).max()), 1)
        padded = round_frames(frames, FRAME_UNIT, FRAME_STEPS)
        mask = np.zeros((batch, padded, 1), np.float32)
        mask[:, :frames, 0] = keep[:, :frames].numpy()
        inputs["windows"] = first_inputs(self.spec, wavs, padded)
        inputs["keep"] = mask
        with self._request() as request:
            request.infer(inputs, share_inputs=True)
            return output(request, frames=frames)
