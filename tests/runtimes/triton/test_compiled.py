"""Every kernel compiled for GPUs that need not be there.

Shapes are those of HuBERT-Large at 10 s. What is checked for each architecture:
products run on its matrix instruction, in integers; asynchronous products are
fenced, and copies waited for; nothing is spilled, and the block fits onto the
multiprocessor.
"""

import os
from inspect import signature as signature_of

import pytest
import torch
from resources import compile_launch, is_fenced, launches_of, specialize
from shapes import meta

from speechbrain_stablequant.runtimes.triton.build import MIN_TRITON
from speechbrain_stablequant.runtimes.triton.kernels import (
    architectures,
    attention,
    group_conv,
    layer_norm,
    matmul,
    quantize,
    wave_conv,
)
from speechbrain_stablequant.runtimes.triton.kernels.architectures import (
    ARCHITECTURES,
    VERSION,
    Card,
)
from speechbrain_stablequant.runtimes.triton.kernels.tiles import Config

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="interpreted kernels are not compiled",
    ),
    pytest.mark.skipif(
        VERSION < MIN_TRITON, reason="this version of Triton is refused"
    ),
]

REGISTERS = 65536
INT8, HALF, FLOAT = torch.int8, torch.float16, torch.float32
FRAMES = 499
#: After a product: GELU, quantized; or 16 bit.
ACTIVATED, PLAIN = (True, INT8, 2.0, 127, -113), (False, HALF)

ROWS, ONE = 8 * FRAMES, (meta(512), meta(512))
NORM = (meta(1024), meta(1024), 1e-5)
WAVE = (meta(1, 160000), 3.0, 127)
HIDDEN = meta(ROWS, 1024, dtype=HALF)


def linear(columns: int, depth: int, end: tuple, residual=None) -> tuple:
    """Arguments of a linear layer on a batch of 8 utterances."""
    q, weight = meta(ROWS, depth, dtype=INT8), meta(columns, depth, dtype=INT8)
    return (q, weight, meta(columns), meta(columns), residual, *end)


#: Kernel -> launch, arguments, and the type of its products; None: no product.
KERNELS = {
    "up": (matmul.launch_linear, linear(4096, 1024, ACTIVATED), "s8"),
    "down": (matmul.launch_linear, linear(1024, 4096, PLAIN, HIDDEN), "s8"),
    "qkv": (matmul.launch_linear, linear(3072, 1024, PLAIN), "s8"),
    "odd depth": (matmul.launch_linear, linear(32, 1000, PLAIN), "s8"),
    "conv": (
        matmul.launch_conv,
        (
            *(meta(1, 31999, 512, dtype=INT8), meta(512, 1536, dtype=INT8)),
            *(*ONE, 3, 2, *ONE, 1e-5, *ACTIVATED),
        ),
        "s8",
    ),
    "conv without norm": (
        matmul.launch_conv,
        (
            *(meta(1, 31999, 512, dtype=INT8), meta(512, 1536, dtype=INT8)),
            *(*ONE, 3, 2, None, None, 0.0, *ACTIVATED),
        ),
        "s8",
    ),
    "first conv": (
        wave_conv.launch,
        (*WAVE, meta(512, 10, dtype=INT8), *ONE, 5, *ONE, 1e-5, *ACTIVATED),
        "s8",
    ),
    "first conv, own scales": (
        wave_conv.launch,
        (
            *(*WAVE, meta(512, 10, dtype=HALF), meta(1, 512), meta(1, 512), 5),
            *(None, None, 0.0, *ACTIVATED),
        ),
        "f16",
    ),
    "sums": (
        wave_conv.launch_gram,
        (*WAVE, INT8, 10, 5, meta(dtype=torch.int64)),
        None,
    ),
    "position": (
        group_conv.launch,
        (
            meta(1, FRAMES, 1024, dtype=INT8),
            meta(16, 64, 128, 64, dtype=INT8),
            *(meta(1024), meta(1024), meta(1, FRAMES, 1024, dtype=HALF)),
            *(64, 1, True, HALF),
        ),
        "s8",
    ),
    "attention": (
        attention.launch,
        (
            *(meta(1, 512, 3072, dtype=HALF), 16),
            *(meta(1, dtype=torch.int64), INT8, 2.0, 127),
        ),
        "f16",
    ),
    "norm": (layer_norm.launch, (HIDDEN, *NORM, False, *ACTIVATED[1:]), None),
    "both norms": (
        layer_norm.launch_both,
        (HIDDEN, *NORM, HALF, 2.0, 127, -113),
        None,
    ),
    "quantize": (quantize.launch, (HIDDEN, 2.0, 127, True, -113), None),
}

#: How a matrix instruction names the type of its factors.
KINDS = {
    ("mma.sync", "s8"): ".s32.s8.s8.s32",
    ("wgmma", "s8"): ".s32.s8.s8",
    ("tcgen05", "s8"): "kind::i8",
    ("mma.sync", "f16"): ".f32.f16.f16.f32",
    ("wgmma", "f16"): ".f32.f16.f16",
    ("tcgen05", "f16"): "kind::f16",
}


@pytest.fixture
def card(request, monkeypatch):
    """A card of an architecture, for which tiles are chosen."""
    found = Card(ARCHITECTURES[request.param], 132)
    monkeypatch.setattr(architectures, "ASSUMED", found)
    return found


def check(card: Card, name: str, tile: Config | None = None):
    """Compiles a kernel, by default with the tile that the rule chooses, and
    checks what holds for every one."""
    launch, arguments, kind = KERNELS[name]
    options = {} if tile is None else {"config": tile}
    (recorded,) = launches_of(launch, *arguments, **options)
    row = card.architecture
    (major, minor) = next(k for k, v in ARCHITECTURES.items() if v is row)
    found = compile_launch(recorded, 10 * major + minor)
    assert found.stack_bytes == 0
    assert found.shared_bytes <= card.shared_bytes
    assert found.registers * found.warps * 32 <= REGISTERS
    assert is_fenced(found.ptx)
    if kind is None:
        assert found.tensor_core == ()
        return found
    if kind == "s8" and not row.int8_pays and "first" not in name:
        kind = "f16"
    gluon = tile is not None and tile.gluon
    used = {row.instruction if gluon else card.instruction}
    if kind != "s8" and not card.races:
        used.add(row.instruction)
    # too few rows for the others; tcgen05 also wants many columns
    if kind != "s8" or recorded.arguments["BLOCK_M"] < 64:
        used.add("mma.sync")
    for instruction in found.tensor_core:
        family = next(x for x in used if instruction.startswith(x))
        assert KINDS[family, kind] in instruction
    assert found.tensor_core
    if "cp.async" in found.ptx:
        stages = recorded.options["num_stages"]
        # copies overlap products from three stages on; the last wait is for all
        assert (found.waits[0] > 0) == (stages > 2)
        assert found.waits[-1] == 0
    if gluon:
        # a product is waited for while the next one runs
        assert found.product_waits == [1, 0]
    return found


def of(*capabilities):
    """Parametrizes the card."""
    ids = "sm_{}{}".format
    return pytest.mark.parametrize(
        "card", capabilities, indirect=True, ids=lambda c: ids(*c)
    )


@pytest.mark.slow
@of(*ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel(card, name):
    found = check(card, name)
    if name == "attention":
        # integers leave in whole vectors
        assert "st.global.v4.b32" in found.ptx


@pytest.mark.slow
@of((8, 0), (9, 0))
@pytest.mark.parametrize("name", ["up", "down", "conv"])
def test_every_outline(card, name):
    """The first form of each; and of the largest, one that goes on."""
    _, arguments, _ = KERNELS[name]
    columns, depth = arguments[1].shape
    product = (8 * 31999, columns, depth, name == "conv", name == "down", card)
    tiles = matmul._candidates(*product)
    forms = {(t.outline, t.persistent): t for t in reversed(tiles)}
    lasting = [t for t in tiles if t.persistent][:1]
    for tile in [*lasting, *(t for t in forms.values() if not t.persistent)]:
        check(card, name, tile)


@pytest.mark.slow
@of((9, 0))
@pytest.mark.parametrize("name", ["qkv", "up", "down", "conv without norm"])
def test_every_tile_for_hopper(card, name, hopper):
    """With any Triton that has Gluon: the fence is in the kernel."""
    _, (_, weight, *_), _ = KERNELS[name]
    residual = name == "down"
    tiles = hopper.tiles(card, weight.shape[1], residual)
    assert len(tiles) > 8
    for tile in tiles:
        check(card, name, tile)


@pytest.mark.parametrize(
    ("card", "name", "tile"),
    [
        ((9, 0), "up", Config(64, 64, 128, 4, 4, gluon=True)),
        ((8, 6), "quantize", None),
        ((9, 0), "up", Config(64, 64, 128, 4, 3)),
        ((10, 3), "odd depth", Config(64, 32, 64, 4, 3)),
        ((12, 0), "sums", None),
    ],
    indirect=["card"],
)
def test_some_kernels(card, name, tile, request):
    """For every day; the marked tests compile all of them."""
    gluon = tile is not None and tile.gluon
    if gluon:
        request.getfixturevalue("hopper")
    if card.races and not gluon:
        tile = None
    found = check(card, name, tile)
    if name != "up" or (card.races and not gluon):
        return
    # a fence or a barrier taken out is found
    for what in ("fence.proxy.async", "bar.sync"):
        assert what in found.ptx
        assert not is_fenced(found.ptx.replace(what, "nop"))


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
    options["config"] = Config(64, 64, 64, 4, 3, gluon=True)
    linear = (q, square, vector, vector, x, *ends)
    yield from launches_of(matmul.launch_linear, *linear, **options)


def test_another_length_needs_no_compilation():
    """Tiles are given: what is left are the sizes themselves."""
    sources = [
        [specialize(launch) for launch in _launches(*size)]
        for size in ((1, 17), (3, 64), (16, 63))
    ]
    assert len(sources[0]) == 10
    for same in zip(*sources, strict=True):
        kept = {
            (s.name, str(s.signature), str(s.constants), str(s.attrs))
            for s in same
        }
        assert len(kept) == 1
