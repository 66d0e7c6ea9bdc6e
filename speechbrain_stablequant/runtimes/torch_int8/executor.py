"""Runs an encoder with integer products in plain torch.

Utterances are cut to their real frames and packed, so that no padding is
computed and attention needs no mask. Features, positional convolution and
attention run per utterance, all products between on all frames at once.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from ...core.encoder_spec import BlockSpec, EncoderSpec
from ...utils import forks
from ..base import require_frame
from ..cpu import cpu_class
from ..reference import apply_norm
from .conv import make_conv
from .front import FeatureExtractor
from .input_forms import Floats
from .linear import SharedInput, make_linear, padded_rows, rows_of

_lock = threading.Lock()
# Number of calls with their own number of threads, and torch's number
# outside of them.
_calls, _outside = 0, 0


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Context in which torch computes with ``threads`` threads. Torch's
    number is process-wide, and another call may have changed it meanwhile:
    the first call knows the number to restore."""
    global _calls, _outside
    if threads is None or forks.in_child():
        yield
        return
    with _lock:
        if not _calls:
            _outside = torch.get_num_threads()
        _calls += 1
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            torch.set_num_threads(_outside)


def attend(
    qkv: torch.Tensor, lengths: Sequence[int], heads: int
) -> torch.Tensor:
    """Attention of packed utterances: ``qkv`` [rows, 3 * channels], query
    already scaled, to [rows, channels]. ``lengths``: frames of each
    utterance; rows after these are zero.

    Keys are padded, see :func:`padded_rows`: for each size of a bfloat16
    product oneDNN keeps 0.3 MB."""
    total, width = qkv.shape
    out = qkv.new_empty(total, width // 3)
    columns = qkv.view(total, 3 * heads, -1).unbind(1)
    targets = out.view(total, heads, -1).unbind(1)
    # One buffer for all heads: allocation costs more than the computation.
    scores = qkv.new_empty(padded_rows(max(lengths)) ** 2)
    for head, target in enumerate(targets):
        query, key, value = (columns[head + i * heads] for i in range(3))
        start = 0
        for length in lengths:
            # Rows of the next utterance are overwritten by its own.
            reach = min(padded_rows(length), total - start)
            part = slice(start, start + reach)
            weights = scores[: reach**2].view(reach, reach)
            torch.mm(query[part], key[part].t(), out=weights)
            weights[:, length:] = -torch.inf
            torch.softmax(weights, -1, out=weights)
            torch.mm(weights, value[part], out=target[part])
            start += length
    out[sum(lengths) :] = 0
    return out


class Block:
    """A transformer block; ``dtype`` is that of attention and float layers."""

    def __init__(
        self, spec: BlockSpec, heads: int, pre_norm: bool, dtype: torch.dtype
    ):
        width = spec.query.weight.shape[0] // heads
        self.heads, self.pre_norm, self.dtype = heads, pre_norm, dtype
        self.norm1, self.norm2 = spec.norm1, spec.norm2
        self.qkv = SharedInput(
            [
                rows_of(spec.query, dtype, width**-0.5),
                rows_of(spec.key, dtype),
                rows_of(spec.value, dtype),
            ]
        )
        self.out = make_linear(spec.out, dtype)
        self.up = make_linear(spec.up, dtype)
        self.down = make_linear(spec.down, dtype)

    def __call__(self, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Run the block on float32 [frames, channels], which is overwritten;
        ``lengths``: frames of each utterance."""
        y = apply_norm(self.norm1, x) if self.pre_norm else x
        qkv = self.qkv(y, self.dtype)
        attended = attend(qkv, lengths, self.heads)
        x = self.out.add_(self.out.form.prepare(attended), x)
        if not self.pre_norm:
            x = apply_norm(self.norm1, x)
        y = apply_norm(self.norm2, x) if self.pre_norm else x
        y = self.up.gelu(self.up.form.prepare(y), self.down.form)
        x = self.down.add_(y, x)
        return x if self.pre_norm else apply_norm(self.norm2, x)


class TorchInt8Executor:
    """Executes an encoder. A process forked from one with a runtime computes
    with one thread."""

    def __init__(self, spec: EncoderSpec, threads: int | None = None):
        # bfloat16 between integer products, where the CPU multiplies it.
        dtype = torch.bfloat16 if cpu_class().bf16 else torch.float32
        self.threads = threads
        self.pre_norm = spec.pre_norm
        self.norm = spec.norm
        self.projection = make_linear(spec.projection, dtype)
        self.projection_norm = spec.projection_norm
        features = self.projection.form
        if spec.projection_norm is not None:
            features = Floats(torch.float32)
        self.features = FeatureExtractor(spec.convs, features, dtype)
        self.pos_conv = make_conv(spec.pos_conv, dtype)
        self.rotation = spec.rotation
        self.blocks = [
            Block(block, spec.num_heads, spec.pre_norm, dtype)
            for block in spec.blocks
        ]

    def _add_position(self, x: torch.Tensor, lengths: list[int]) -> None:
        """Add the positional embedding of each utterance to [rows, channels]
        in place."""
        conv = self.pos_conv
        position = torch.zeros_like(x)
        frames = sum(lengths)
        for part, target in zip(
            x[:frames].split(lengths),
            position[:frames].split(lengths),
            strict=True,
        ):
            y = conv(conv.form.prepare(part[None]), torch.float32)[0]
            target.copy_(y[: len(part)])
        x += F.gelu(position)

    def _encode(self, features: list[torch.Tensor]) -> torch.Tensor:
        lengths = [len(f) for f in features]
        frames = sum(lengths)
        # Rows that nothing reads.
        more = padded_rows(frames) - frames
        x = torch.cat([*features, features[0][:1].expand(more, -1)])
        del features
        if self.projection_norm is not None:
            x = apply_norm(self.projection_norm, x)
            x = self.projection.form.prepare(x)
        x = self.projection(x, torch.float32)
        self._add_position(x, lengths)
        if not self.pre_norm:
            x = apply_norm(self.norm, x)
        if self.rotation is not None:
            x = x @ self.rotation.T
        for block in self.blocks:
            x = block(x, lengths)
        if self.rotation is not None:
            x = x @ self.rotation
        x = x[:frames]
        return apply_norm(self.norm, x) if self.pre_norm else x

    @torch.no_grad()
    def __call__(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode a batch, see :class:`..base.EncoderExecutor`; padded frames
        are zero."""
        wavs = wavs.detach().float().cpu()
        batch, samples = wavs.shape
        frames = self.features.frames(samples)
        require_frame(frames, samples)
        real = [samples] * batch if lengths is None else lengths.tolist()
        real = [min(n, samples) for n in real]
        counts = [self.features.frames(n) for n in real]
        rows = [i for i, count in enumerate(counts) if count]
        width = self.norm.weight.numel()
        hidden = torch.zeros(batch, frames, width)
        if not rows:
            return hidden
        with _torch_threads(self.threads):
            # The gain of a norm over time is that of the padded input.
            features = self.features(wavs[rows], [real[i] for i in rows])
            encoded = self._encode(features)
        parts = encoded.split([counts[i] for i in rows])
        for i, part in zip(rows, parts, strict=True):
            hidden[i, : counts[i]] = part
        return hidden
