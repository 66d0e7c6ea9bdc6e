"""Executes an encoder on CUDA, with one CUDA graph per bucket of lengths."""

import threading

import torch

from ...core.encoder_spec import EncoderSpec
from ...model.encoders import conv_samples
from ...utils.timing import PREPARATION
from ..base import require_frame, round_frames
from .forms import Place
from .graphs import Inputs, cuda_graphs
from .kernels.tuning import Tuner
from .network import Network


def bucket_samples(spec: EncoderSpec, samples: int) -> int:
    """Length to pad to: at most 12.5 % or 7 frames more than needed."""
    # samples behind the last frame may need one more frame
    geometry = spec.conv_geometry()
    frames = round_frames(spec.frames(samples))
    while conv_samples(frames, geometry) < samples:
        frames = round_frames(frames + 1)
    return conv_samples(frames, geometry)


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
        max_graph_mb: int,
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
                self.graphs = cuda_graphs(
                    self._run, device, max_graphs, max_graph_mb * 10**6
                )

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
            seen, out = key in self._seen, None
            self._seen.add(key)
            if self.graphs is not None and seen:
                out = self.graphs(key, wavs, lengths, frames)
            if out is None:
                inputs = Inputs.empty(key, self.device)
                inputs.fill(wavs, lengths)
                if on_cuda and not seen:
                    # compiles kernels and tries tiles
                    with PREPARATION.running(torch.cuda.synchronize):
                        self._run(inputs)
                out = self._run(inputs)[:, :frames].to(torch.float32)
            return out
