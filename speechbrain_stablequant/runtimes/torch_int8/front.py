"""The feature extractor: wave to frames."""

import math

import torch
from torch.nn import functional as F

from ...core.encoder_spec import ConvSpec, Norm
from ...core.integer_layer import FloatLayer
from ..algorithms import check_front
from ..group_norm import gain_and_shift
from .input_forms import Form
from .linear import ROWS, GainShift, make_linear


def layer_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """LayerNorm over the last axis."""
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


class Stage:
    """A convolution as products with windows, its norm, GELU, and the
    conversion to the next layer's form ``then``."""

    #: Frames computed at a time, so that data stays in the caches.
    rows = 2048

    def __init__(self, spec: ConvSpec, then: Form, dtype: torch.dtype):
        conv = spec.conv
        check_front(conv)
        self.kernel, self.stride = conv.weight.shape[2], conv.stride
        self.norm = spec.norm
        self.then = then
        self.product = make_linear(conv, dtype)
        self.form = self.product.form
        self.channels = conv.weight.shape[0]

    def inputs(self, frames: int) -> int:
        """Input frames that give ``frames`` output frames."""
        return (frames - 1) * self.stride + self.kernel

    def frames(self, inputs: int) -> int:
        """Output frames of ``inputs`` input frames."""
        return max((inputs - self.kernel) // self.stride + 1, 0)

    def windows(self, x: torch.Tensor, start: int, count: int) -> torch.Tensor:
        """Windows of [time, in], each flattened to the frames one after the
        other."""
        width = x.shape[1]
        step = self.stride * width
        return x.as_strided(
            (count, self.kernel * width),
            (step, 1),
            x.storage_offset() + start * step,
        ).contiguous()

    def __call__(
        self, x: torch.Tensor, norm: GainShift | None = None
    ) -> torch.Tensor:
        """Run the stage on a stretch of one utterance, contiguous [time, in]
        in its form; ``norm`` is that over time."""
        frames = self.frames(x.shape[0])
        out = x.new_empty((frames, self.channels), dtype=self.then.dtype)
        # Parts of equal size: a short one takes a third of a full one's time.
        parts = max(-(-frames // self.rows), 1)
        rows = -(-frames // parts)
        for place in range(parts):
            start = min(place * rows, frames - rows)
            windows, part = self.windows(x, start, rows), out[start:][:rows]
            if self.norm is None or self.norm.over_time:
                self.product.gelu(windows, self.then, norm, part)
            else:
                y = self.product(windows, torch.float32)
                self.then.prepare(F.gelu(layer_norm(y, self.norm)), part)
        return out


class FeatureExtractor:
    """All convolutions; features are given in the form ``then``."""

    #: Frames that pass all convolutions before the next ones.
    stretch = 256

    def __init__(
        self, convs: tuple[ConvSpec, ...], then: Form, dtype: torch.dtype
    ):
        self.stages: list[Stage] = []
        for spec in reversed(convs):
            if spec is convs[0] and isinstance(spec.conv, FloatLayer):
                dtype = torch.float32  # keeps the wave exact
            self.stages.insert(0, Stage(spec, then, dtype))
            then = self.stages[0].form
        norm = convs[0].norm
        over_time = norm is not None and norm.over_time
        self._over_time = convs[0] if over_time else None

    def frames(self, samples: int) -> int:
        """Number of frames of a wave."""
        for stage in self.stages:
            samples = stage.frames(samples)
        return samples

    def samples(self, frames: int) -> int:
        """Samples that give ``frames`` frames."""
        for stage in reversed(self.stages):
            frames = stage.inputs(frames)
        return frames

    def _utterance(
        self, wave: torch.Tensor, norm: GainShift | None
    ) -> torch.Tensor:
        first, *others = self.stages
        frames = self.frames(len(wave))
        rows = frames + -frames % ROWS
        wave = F.pad(wave, (0, max(self.samples(rows) - len(wave), 0)))
        x = first.form.prepare(wave[:, None])
        hop = math.prod(stage.stride for stage in self.stages)
        parts = []
        for start in range(0, rows, self.stretch):
            needed = self.samples(min(self.stretch, rows - start))
            part = first(x[start * hop : start * hop + needed], norm)
            for stage in others:
                part = stage(part)
            parts.append(part)
        return torch.cat(parts)[:frames]

    def __call__(
        self, wavs: torch.Tensor, lengths: list[int]
    ) -> list[torch.Tensor]:
        """Features [frames, channels] of each utterance of a batch [batch,
        samples]; ``lengths``: samples of each, enough for a frame."""
        norms = [None] * len(lengths)
        if self._over_time is not None:
            # The float model's norm sees the padding, too.
            norms = zip(*gain_and_shift(self._over_time, wavs), strict=True)
        rows = zip(wavs, lengths, norms, strict=True)
        return [self._utterance(wav[:n], norm) for wav, n, norm in rows]
