"""Runs an encoder with integer products in plain torch.

Utterances are cut to their real frames and packed one after the other, so
that no padding is computed and attention needs no mask. The features, the
positional convolution and attention run utterance by utterance, the products
between on all frames at once.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from ...core.encoder_spec import BlockSpec, EncoderSpec
from ...utils import forks
from ..base import require_frame
from ..cpu import cpu_class
from .attention import attend
from .conv import make_conv
from .forms import Floats
from .front import FeatureExtractor, layer_norm
from .linear import SharedInput, make_linear, rows_of

_lock = threading.Lock()
# Calls that compute with a number of threads of their own, and torch's number
# outside of them.
_calls, _outside = 0, 0


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Context in which torch computes with a number of threads. The number
    that a thread finds when it first calls torch is the process's, which
    another call may have changed for the moment; so it is the first call that
    knows what to go back to."""
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


class Block:
    """A transformer block.

    Arguments
    ---------
    spec : BlockSpec
        The block.
    heads : int
        Attention heads.
    pre_norm : bool
        Where the norms are, see
        :class:`~speechbrain_stablequant.core.encoder_spec.BlockSpec`.
    dtype : torch.dtype
        Of attention and of layers that are not quantized.
    """

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
        """Runs the block.

        Arguments
        ---------
        x : torch.Tensor
            float32 [frames, channels], overwritten.
        lengths : list of int
            Frames of each utterance.

        Returns
        -------
        torch.Tensor
            float32 [frames, channels].
        """
        y = layer_norm(x, self.norm1) if self.pre_norm else x
        qkv = self.qkv(y, self.dtype)
        attended = attend(qkv, lengths, self.heads)
        x = self.out.add_(self.out.form.prepare(attended), x)
        if not self.pre_norm:
            x = layer_norm(x, self.norm1)
        y = layer_norm(x, self.norm2) if self.pre_norm else x
        y = self.up.gelu(self.up.form.prepare(y), self.down.form)
        x = self.down.add_(y, x)
        return x if self.pre_norm else layer_norm(x, self.norm2)


class TorchInt8Executor:
    """Executes an encoder.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    threads : int or None
        Threads; None for as many as torch uses. A process that was forked
        from one with a runtime computes with one.
    """

    def __init__(self, spec: EncoderSpec, threads: int | None = None):
        # 16 bits for what is between integer products, where the CPU
        # multiplies them.
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
        self.pos_trim = spec.pos_trim
        self.rotation = spec.rotation
        self.blocks = [
            Block(block, spec.num_heads, spec.pre_norm, dtype)
            for block in spec.blocks
        ]

    def _position(self, x: torch.Tensor) -> torch.Tensor:
        """The positional embedding of one utterance, [frames, channels]."""
        conv = self.pos_conv
        y = conv(conv.form.prepare(x[None]), torch.float32)[0]
        return F.gelu(y[: y.shape[0] - self.pos_trim])

    def _encode(self, features: list[torch.Tensor]) -> torch.Tensor:
        lengths = [len(f) for f in features]
        x = torch.cat(features)
        del features
        if self.projection_norm is not None:
            x = layer_norm(x, self.projection_norm)
            x = self.projection.form.prepare(x)
        x = self.projection(x, torch.float32)
        for part in x.split(lengths):
            part += self._position(part)
        if not self.pre_norm:
            x = layer_norm(x, self.norm)
        if self.rotation is not None:
            x = x @ self.rotation.T
        for block in self.blocks:
            x = block(x, lengths)
        if self.rotation is not None:
            x = x @ self.rotation
        return layer_norm(x, self.norm) if self.pre_norm else x

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
            int64 [batch], real samples; None: all.

        Returns
        -------
        torch.Tensor
            float32 [batch, frames, channels], zero at padded frames.

        Raises
        ------
        ValueError
            An input too short for one frame.
        """
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


def make_executor(
    spec: EncoderSpec, threads: int | None = None
) -> TorchInt8Executor:
    """The runtime's entry, see :class:`TorchInt8Executor`.

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    threads : int or None
        Threads.

    Returns
    -------
    TorchInt8Executor
    """
    return TorchInt8Executor(spec, threads)
