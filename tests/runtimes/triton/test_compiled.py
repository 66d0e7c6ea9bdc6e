"""Every kernel compiled for GPUs that need not be there.

Shapes are those of HuBERT-Large and wav2vec2-Base at 10 s. What is checked:
products run on the integer tensor cores, nothing is spilled, and the block
fits onto the multiprocessor.
"""

import os
from dataclasses import replace
from inspect import signature as signature_of

import pytest
import torch
import triton
from resources import compile_launch, launches_of, specialize
from shapes import meta

from speechbrain_stablequant.runtimes.triton.build import MIN_TRITON
from speechbrain_stablequant.runtimes.triton.kernels import (
    attention,
    group_conv,
    layer_norm,
    matmul,
    quantize,
    wave_conv,
)
from speechbrain_stablequant.runtimes.triton.kernels.tiles import Config

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="interpreted kernels are not compiled",
    ),
    pytest.mark.skipif(
        VERSION < MIN_TRITON, reason="this version of Triton is refused"
    ),
]

#: Architecture -> bytes of shared memory that a block may have.
ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 65536
INT8, HALF = torch.int8, torch.float16
FRAMES = 499
#: After a product: GELU, quantized; or 16 bit.
ACTIVATED, FLOAT = (True, INT8, 2.0, 127, -113), (False, HALF)


def compiled(arch: int, function, *args, **kwargs):
    """Resources of the one kernel that a call launches."""
    (launch,) = launches_of(function, *args, **kwargs)
    return compile_launch(launch, arch)


def check(arch: int, found, kind: str | None = ".s32.s8.s8") -> None:
    """What holds for every kernel; ``kind`` is that of its products."""
    assert found.spill_bytes == 0
    assert found.stack_bytes == 0
    assert found.shared_bytes <= ARCHITECTURES[arch]
    assert found.registers * found.warps * 32 <= REGISTERS
    if kind is None:
        assert found.tensor_core == ()
        return
    assert found.tensor_core
    assert all(kind in name for name in found.tensor_core)


def is_wgmma(found) -> bool:
    """Whether the product runs on a whole warp group (Hopper)."""
    return all(name.startswith("wgmma") for name in found.tensor_core)


def linear(arch, columns, depth, has_residual, end, tile=None):
    """Resources of a linear layer on a batch of 8 utterances."""
    rows = 8 * FRAMES
    q, weight = meta(rows, depth, dtype=INT8), meta(columns, depth, dtype=INT8)
    residual = meta(rows, columns, dtype=HALF) if has_residual else None
    rest = (meta(columns), meta(columns), residual, *end)
    return compiled(arch, matmul.launch_linear, q, weight, *rest, config=tile)


def convolution(arch, tile):
    """Resources of a convolution with a LayerNorm."""
    q, weight = meta(1, 31999, 512, dtype=INT8), meta(512, 1536, dtype=INT8)
    two = (meta(512), meta(512))
    rest = (*two, 3, 2, *two, 1e-5, *ACTIVATED)
    return compiled(arch, matmul.launch_conv, q, weight, *rest, config=tile)


def lasting(tiles):
    """The same tiles, by blocks that go on to the next one."""
    return [replace(tile, persistent=True) for tile in tiles]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "tile", [*matmul.TILES, *lasting(matmul.TILES[:3])], ids=str
)
def test_gelu_and_quantize(arch, tile):
    found = linear(arch, 4096, 1024, False, ACTIVATED, tile)
    check(arch, found)
    assert is_wgmma(found) == (arch == 90)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "tile",
    [*matmul.TILES[:4], matmul.TILES[-1], *lasting(matmul.TILES[1:3])],
    ids=str,
)
def test_residual(arch, tile):
    found = linear(arch, 1024, 4096, True, FLOAT, tile)
    check(arch, found)
    assert is_wgmma(found) == (arch == 90)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("channels", [768, 1024])
def test_projections(arch, channels):
    check(arch, linear(arch, 3 * channels, channels, False, FLOAT))


@pytest.mark.parametrize("tile", matmul.RAGGED_TILES, ids=str)
def test_depth_that_is_no_multiple_of_the_tile(tile):
    for arch in ARCHITECTURES:
        check(arch, linear(arch, 32, 1000, False, FLOAT, tile))


def test_fits_onto_cards_with_little_shared_memory():
    """What the candidates are chosen by is an upper bound of what they need."""
    for m, k, warps, stages in matmul.ROW_TILES:
        tile = Config(m, 512, k, warps, stages)
        if tile.shared_bytes() > 99 * 1024:
            continue
        found = convolution(86, tile)
        assert found.spill_bytes == 0
        assert found.shared_bytes <= tile.shared_bytes()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "m, k, warps, stages, persistent",
    [
        *((*tile, False) for tile in matmul.ROW_TILES),
        *((*tile, True) for tile in matmul.PERSISTENT_ROWS),
    ],
)
def test_convolution_with_layer_norm(arch, m, k, warps, stages, persistent):
    found = convolution(arch, Config(m, 512, k, warps, stages, persistent))
    check(arch, found)
    # an instruction of a warp group multiplies 64 rows
    assert is_wgmma(found) == (arch == 90 and m >= 64)


def first_convolution(arch, kind, by_utterance: bool, tile):
    """Resources of the first convolution on 10 s, with a scale of each
    utterance or else with a LayerNorm."""
    one = meta(1, 512) if by_utterance else meta(512)
    norm = (None, None) if by_utterance else (meta(512), meta(512))
    rest = (meta(512, 10, dtype=kind), one, one, 5, *norm, 1e-5, *ACTIVATED)
    wave = (meta(1, 160000), 3.0, 127)
    return compiled(arch, wave_conv.launch, *wave, *rest, config=tile)


#: Of the weights of the first convolution -> what multiplies them.
WAVE_PRODUCTS = {INT8: ".s32.s8.s8", HALF: ".f32.f16.f16"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", WAVE_PRODUCTS, ids=str)
@pytest.mark.parametrize("m, warps", wave_conv.ROW_TILES)
def test_first_convolution_with_layer_norm(arch, kind, m, warps):
    tile = Config(m, 512, 32, warps, 1)
    found = first_convolution(arch, kind, False, tile)
    check(arch, found, WAVE_PRODUCTS[kind])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", WAVE_PRODUCTS, ids=str)
@pytest.mark.parametrize("m, n, warps", wave_conv.TILES)
def test_first_convolution_with_a_scale_of_its_own(arch, kind, m, n, warps):
    tile = Config(m, n, 32, warps, 1)
    found = first_convolution(arch, kind, True, tile)
    check(arch, found, WAVE_PRODUCTS[kind])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", WAVE_PRODUCTS, ids=str)
def test_sums_for_group_norm(arch, kind):
    window = (kind, 10, 5, meta(dtype=torch.int64))
    found = compiled(
        arch, wave_conv.launch_gram, *(meta(1, 160000), 3.0, 127), *window
    )
    check(arch, found, kind=None)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m, k, warps, stages", group_conv.TILES)
@pytest.mark.parametrize("channels", [48, 64])
def test_positional_convolution(arch, m, k, warps, stages, channels):
    if channels == 48 and m != 64:
        pytest.skip("the smaller tile stands for wav2vec2-Base")
    width = 16 * channels
    found = compiled(
        arch,
        group_conv.launch,
        meta(1, FRAMES, width, dtype=INT8),
        meta(16, channels, 128, 64, dtype=INT8),
        meta(width),
        meta(width),
        meta(1, FRAMES, width, dtype=HALF),
        *(64, 1, True, HALF),
        config=Config(m, 64, k, warps, stages),
    )
    check(arch, found)
    assert is_wgmma(found) == (arch == 90)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m, n, warps, stages", attention.TILES)
def test_attention(arch, m, n, warps, stages):
    found = compiled(
        arch,
        attention.launch,
        *(meta(1, 512, 3072, dtype=HALF), 16, meta(1, dtype=torch.int64)),
        *(INT8, 2.0, 127),
        config=Config(m, n, 64, warps, stages),
    )
    check(arch, found, kind=".f32.f16.f16")
    assert is_wgmma(found) == (arch == 90 and m >= 64)
    # integers leave in whole vectors
    assert "st.global.v4.b32" in found.ptx


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_no_product(arch):
    x, vector = meta(FRAMES, 1024, dtype=HALF), meta(1024)
    norm = (x, vector, vector, 1e-5)
    one, many = (INT8, 2.0, 127, -113), (HALF, 2.0, 127, -113)
    for tile in layer_norm._candidates(1024):
        for function, arguments in (
            (layer_norm.launch, (*norm, False, *one, tile)),
            (layer_norm.launch_both, (*norm, *many, tile)),
        ):
            check(arch, compiled(arch, function, *arguments), kind=None)
    found = compiled(arch, quantize.launch, x, 2.0, 127, True, -113)
    check(arch, found, kind=None)


def _launches(batch: int, frames: int):
    """Launches of every kernel on a batch of some length."""
    x, vector = meta(batch, frames, 64, dtype=HALF), meta(64)
    q, square = meta(batch, frames, 64, dtype=INT8), meta(64, 64, dtype=INT8)
    norm, ends = (vector, vector, 1e-5), (True, HALF)
    kernel = meta(64, 192, dtype=INT8)
    grouped = meta(4, 16, 16, 32, dtype=INT8)
    wave = meta(batch, 5 * frames + 5)
    taps = meta(64, 10, dtype=INT8)
    real = meta(batch, dtype=torch.int64)
    count = meta(dtype=torch.int64)
    own = meta(batch, 64)
    grid = (1.0, 127)
    qkv = meta(batch, frames, 192, dtype=HALF)
    for function, arguments in (
        (matmul.launch_linear, (q, square, vector, vector, x, *ends)),
        (matmul.launch_conv, (q, kernel, vector, None, 3, 2, *norm, *ends)),
        (group_conv.launch, (q, grouped, vector, None, x, 8, 1, *ends)),
        (attention.launch, (qkv, 1, real, HALF)),
        (layer_norm.launch, (x, *norm, *ends)),
        (quantize.launch, (x, 1.0, 127)),
        (wave_conv.launch_gram, (wave, *grid, INT8, 10, 5, count)),
        (wave_conv.launch_gram, (wave, *grid, HALF, 10, 5, count)),
        (
            wave_conv.launch,
            (wave, *grid, taps, own, own, 5, None, None, 0.0, *ends),
        ),
    ):
        options = {}
        if "config" in signature_of(function).parameters:
            options["config"] = Config(64, 64, 64, 4, 2)
        yield from launches_of(function, *arguments, **options)


def test_another_length_needs_no_compilation():
    """Tiles are given: what is left are the sizes themselves."""
    sources = [
        [specialize(launch) for launch in _launches(*size)]
        for size in ((1, 17), (3, 64), (16, 63))
    ]
    assert len(sources[0]) == 9
    for same in zip(*sources, strict=True):
        kept = {
            (s.name, str(s.signature), str(s.constants), str(s.attrs))
            for s in same
        }
        assert len(kept) == 1
