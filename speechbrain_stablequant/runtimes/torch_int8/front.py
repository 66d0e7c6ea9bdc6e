"""The feature extractor: wave to frames."""

import math

import torch
from torch.nn import functional as F

from ...core.encoder_spec import ConvSpec
from ...core.integer_layer import FloatLayer
from ...model.encoders import conv_frames, conv_samples
from ..algorithms import check_front
from ..group_norm import gain_and_shift
from ..reference import apply_norm
from .input_forms import Form
from .linear import ROWS, GainShift, make_linear


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
        frames = conv_frames(len(x), [(self.kernel, self.stride)])
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
                self.then.prepare(F.gelu(apply_norm(self.norm, y)), part)
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
        self.geometry = [(stage.kernel, stage.stride) for stage in self.stages]
        norm = convs[0].norm
        over_time = norm is not None and norm.over_time
        self._over_time = convs[0] if over_time else None

    def frames(self, samples: int) -> int:
        """Number of frames of a wave."""
        return conv_frames(samples, self.geometry)

    def _utterance(
        self, wave: torch.Tensor, norm: GainShift | None
    ) -> torch.Tensor:
        first, *others = self.stages
        frames = self.frames(len(wave))
        rows = frames + -frames % ROWS
        samples = conv_samples(rows, self.geometry)
        wave = F.pad(wave, (0, max(samples - len(wave), 0)))
        x = first.form.prepare(wave[:, None])
        hop = math.prod(stride for _, stride in self.geometry)
        parts = []
        for start in range(0, rows, self.stretch):
            count = min(self.stretch, rows - start)
            needed = conv_samples(count, self.geometry)
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
