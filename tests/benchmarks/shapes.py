"""What the triton runtime launches for a model: operators and their floors.

Tensors are on the ``meta`` device, so that nothing is computed and no memory
taken. An operator's floor is what it cannot do without: each tensor read or
written once, each product and sum done once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from resources import record_launches

from speechbrain_stablequant.runtimes.triton.kernels import (
    attention,
    group_conv,
    layer_norm,
    matmul,
    quantize,
    wave_conv,
)
from speechbrain_stablequant.runtimes.triton.kernels.library import (
    output_frames,
)

SAMPLE_RATE = 16000
INT8, HALF = torch.int8, torch.float16
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
CONV_CHANNELS = 512
TAPS, GROUPS = 128, 16


@dataclass(frozen=True)
class Model:
    """What the shapes follow from."""

    channels: int
    inner: int
    blocks: int
    heads: int
    # LayerNorm in each convolution and before each sublayer; otherwise one
    # GroupNorm, and LayerNorm after each sublayer
    large: bool


MODELS = {
    "hubert-large": Model(1024, 4096, 24, 16, True),
    "wav2vec2-base": Model(768, 3072, 12, 12, False),
}


@dataclass(frozen=True)
class Op:
    """One kind of launch."""

    name: str
    shape: tuple[int, ...]  # rows, columns and depth of a product, if it is one
    count: int  # launches in a forward
    launch: Callable[..., Any]
    arguments: tuple
    integer_ops: float = 0.0  # of one launch
    float_ops: float = 0.0  # in 16 bit on the tensor cores
    only_int8: bool = False  # whether a model in 16 bit has no such step

    def tensors(self) -> list[torch.Tensor]:
        """All that one launch reads and writes."""
        with record_launches():
            results = self.launch(*self.arguments)
        if isinstance(results, torch.Tensor):
            results = (results,)
        return [
            t
            for t in (*self.arguments, *results)
            if isinstance(t, torch.Tensor)
        ]

    def moved_bytes(self, integer_size: int = 1) -> int:
        """Bytes of one launch; ``integer_size`` 2 for the same in 16 bit."""
        return sum(
            t.numel() * (integer_size if t.dtype == INT8 else t.element_size())
            for t in self.tensors()
        )


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _linear(
    name: str,
    count: int,
    rows: int,
    columns: int,
    depth: int,
    gelu: bool = False,
    residual: bool = False,
) -> Op:
    arguments = (
        meta(rows, depth, dtype=INT8),
        meta(columns, depth, dtype=INT8),
        meta(columns),
        meta(columns),
        meta(rows, columns, dtype=HALF) if residual else None,
        gelu,
        INT8 if gelu else HALF,
    )
    return Op(
        name,
        (rows, columns, depth),
        count,
        matmul.launch_linear,
        arguments,
        integer_ops=2.0 * rows * columns * depth,
    )


#: A product by itself, to compare with a library's.
PRODUCT = _linear("product", 1, 8000, 4096, 1024)


def _front(model: Model, batch: int, samples: int) -> Iterator[Op]:
    """The convolutions."""
    wide = CONV_CHANNELS
    vectors = (meta(wide), meta(wide))
    norm = vectors if model.large else (None, None)
    frames = output_frames("conv1d", samples, KERNELS[0], STRIDES[0])
    rows = batch * frames
    wave = (meta(batch, samples), 1.0, 127, meta(wide, KERNELS[0], dtype=INT8))
    first = {
        "shape": (rows, wide, KERNELS[0]),
        "count": 1,
        "integer_ops": 2.0 * rows * wide * KERNELS[0],
    }
    if not model.large:
        count = meta(dtype=torch.int64)
        yield Op(
            "conv 1, sums for its norm",
            (rows, KERNELS[0] + 1, KERNELS[0]),
            1,
            wave_conv.launch_gram,
            (*wave[:3], INT8, KERNELS[0], STRIDES[0], count),
            only_int8=True,
        )
    scale = vectors if model.large else (meta(batch, wide), meta(batch, wide))
    yield Op(
        "conv 1",
        launch=wave_conv.launch,
        arguments=(*wave, *scale, STRIDES[0], *norm, 1e-5, True, INT8),
        **first,
    )
    for index in range(1, len(KERNELS)):
        kernel, stride = KERNELS[index], STRIDES[index]
        q = meta(batch, frames, wide, dtype=INT8)
        frames = output_frames("conv1d", frames, kernel, stride)
        rows, depth = batch * frames, kernel * wide
        last = index == len(KERNELS) - 1
        yield Op(
            f"conv {index + 1}",
            (rows, wide, depth),
            1,
            matmul.launch_conv,
            (
                *(q, meta(wide, depth, dtype=INT8), *vectors),
                *(kernel, stride, *norm, 1e-5, True, HALF if last else INT8),
            ),
            integer_ops=2.0 * rows * wide * depth,
        )


def _norm(name: str, count: int, rows: int, width: int, to: str) -> Op:
    x, vector = meta(rows, width, dtype=HALF), meta(width)
    if to == "both":
        launch = layer_norm.launch_both
        tail = (HALF, 1.0, 127)
    else:
        launch = layer_norm.launch
        tail = (False, INT8 if to == "int8" else HALF)
    arguments = (x, vector, vector, 1e-5, *tail)
    return Op(name, (rows, width), count, launch, arguments)


def operators(name: str, seconds: float, batch: int) -> list[Op]:
    """Every launch of a forward of a model of ``MODELS``."""
    model = MODELS[name]
    wide, inner, blocks = model.channels, model.inner, model.blocks
    out = list(_front(model, batch, round(seconds * SAMPLE_RATE)))
    rows = out[-1].shape[0]
    frames = rows // batch
    x = meta(batch, frames, wide, dtype=HALF)
    size = wide // GROUPS
    group = (GROUPS, size, TAPS, 64)
    out += [
        _norm("norm before projection", 1, rows, CONV_CHANNELS, "int8"),
        _linear("projection", 1, rows, wide, CONV_CHANNELS),
        Op(
            "quantize for pos_conv",
            (rows, wide),
            1,
            quantize.launch,
            (x, 1.0, 127),
            only_int8=True,
        ),
        Op(
            "pos_conv + GELU + residual",
            (rows, wide, size * TAPS),
            1,
            group_conv.launch,
            (
                meta(batch, frames, wide, dtype=INT8),
                meta(*group, dtype=INT8),
                *(meta(wide), meta(wide), x, TAPS // 2, 1, True, HALF),
            ),
            integer_ops=2.0 * rows * wide * size * TAPS,
        ),
        _norm(
            "norms of the blocks",
            2 * blocks,
            rows,
            wide,
            "int8" if model.large else "both",
        ),
        _linear("query, key, value", blocks, rows, 3 * wide, wide),
        Op(
            "attention",
            (batch * model.heads, frames, wide // model.heads),
            blocks,
            attention.launch,
            (
                meta(batch, frames, 3 * wide, dtype=HALF),
                model.heads,
                meta(batch, dtype=torch.int64),
                INT8,
            ),
            float_ops=4.0 * batch * frames * frames * wide,
        ),
        _linear("out + residual", blocks, rows, wide, wide, residual=True),
        _linear("up + GELU", blocks, rows, inner, wide, gelu=True),
        _linear("down + residual", blocks, rows, wide, inner, residual=True),
        _norm("last norm", 1, rows, wide, "half"),
    ]
    return out
