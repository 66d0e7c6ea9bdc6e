"""The product kernel, as linear layer and as convolution."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from speechbrain_stablequant.runtimes.triton.kernels import (
    architectures,
    matmul,
)
from speechbrain_stablequant.runtimes.triton.kernels.architectures import (
    ARCHITECTURES,
    ASSUMED,
    Card,
)
from speechbrain_stablequant.runtimes.triton.kernels.tiles import Config

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

SMALL = Config(32, 32, 64, 4, 2)
#: After a product: no bias, no residual, no GELU, all digits.
PLAIN = (None, None, False, torch.float32)

#: rows, in, out, gap after each row
SHAPES = [
    (1, 16, 1, 0),
    (7, 100, 33, 0),
    (64, 64, 64, 0),
    (65, 129, 70, 3),
    (100, 33, 12, 0),
]


def _int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize(("rows", "depth", "columns", "gap"), SHAPES)
def test_sums_are_exact(rows, depth, columns, gap, surrounded, launched):
    q, weight = _int8(rows, depth), _int8(columns, depth)
    found = launched(
        "linear", surrounded(q, gap), weight, torch.ones(columns), *PLAIN,
        config=SMALL,
    )  # fmt: skip
    assert torch.equal(found.cpu().long(), q.long() @ weight.long().T)


def test_worst_case_operands_are_exact(launched):
    q = torch.full((33, 1000), -127, dtype=torch.int8)
    weight = torch.full((40, 1000), 127, dtype=torch.int8)
    found = launched("linear", q, weight, torch.ones(40), *PLAIN)
    assert torch.equal(found.cpu().long(), q.long() @ weight.long().T)


@pytest.mark.parametrize("rows", [1, 31, 66])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_ends(
    rows, has_bias, has_residual, gelu, dtype, surrounded, equals_reference
):
    depth, columns = 96, 50
    scale = torch.rand(columns) * 2e-4
    bias = torch.randn(columns) if has_bias else None
    residual = torch.randn(rows, columns).half() if has_residual else None
    if has_residual:
        residual = surrounded(residual, gap=6)
    equals_reference(
        "linear", _int8(rows, depth), _int8(columns, depth), scale, bias,
        residual, gelu, dtype, 21.5, 31, config=SMALL,
    )  # fmt: skip


def _linear(*shape: int):
    """Arguments of a linear layer from a shape to 70 columns."""
    scale, bias = torch.rand(70) * 1e-4, torch.randn(70)
    end = (None, True, torch.int8, 30.0, 127, -113)
    return _int8(*shape), _int8(70, shape[-1]), scale, bias, *end


def _sizes(*arguments):
    """Tiles of different sizes; warps and stages do not matter here."""
    tiles = matmul._tiles(*arguments, ASSUMED)
    return {(t.block_m, t.block_n, t.block_k): t for t in tiles}.values()


@pytest.mark.parametrize("tile", _sizes(70, 1024, False), ids=str)
def test_every_tile(tile, equals_reference):
    equals_reference("linear", *_linear(3, 50, 272), config=tile)


def test_cards_that_multiply_in_16_bit(launched, monkeypatch):
    """Their sums are as exact."""
    slow = Card(ARCHITECTURES[10, 3], 1)
    monkeypatch.setattr(architectures, "ASSUMED", slow)
    q, weight = _int8(70, 272), _int8(40, 272)
    found = launched("linear", q, weight, torch.ones(40), *PLAIN, config=SMALL)
    assert torch.equal(found.cpu().long(), q.long() @ weight.long().T)


@pytest.mark.parametrize("blocks", [1, 3, 7])
@pytest.mark.parametrize("rows", [40, 100])
def test_blocks_that_go_on(rows, blocks, equals_reference, monkeypatch):
    """Fewer blocks than tiles, also such that some have one tile more."""
    monkeypatch.setattr(matmul, "_at_once", lambda tile, device: blocks)
    tile = replace(SMALL, persistent=True)
    equals_reference("linear", *_linear(rows, 192), config=tile)


def _norm(columns: int, has_norm: bool = True):
    """Weight and bias of a LayerNorm, or what stands for none."""
    if not has_norm:
        return None, None
    return torch.randn(columns), torch.randn(columns)


@pytest.mark.parametrize("has_norm", [False, True])
def test_blocks_of_a_convolution_that_go_on(
    has_norm, equals_reference, monkeypatch
):
    monkeypatch.setattr(matmul, "_at_once", lambda tile, device: 2)
    equals_reference(
        "conv1d", _int8(3, 80, 32), _int8(60, 96), torch.rand(60) * 1e-3,
        torch.randn(60), 3, 2, *_norm(60, has_norm), 1e-5, True, torch.int8,
        40.0, 127, config=Config(16, 64, 32, 4, 2, persistent=True),
    )  # fmt: skip


#: batch, frames, in, out, kernel, stride
CONVOLUTIONS = [
    (1, 3, 16, 8, 3, 2),
    (2, 40, 16, 24, 3, 2),
    (3, 33, 20, 40, 2, 2),
    (2, 70, 32, 32, 5, 1),
    (1, 50, 7, 9, 4, 3),
]


@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_convolution_sums_are_exact(geometry, launched):
    batch, frames, channels, columns, kernel, stride = geometry
    q, weight = _int8(batch, frames, channels), _int8(columns, channels, kernel)
    found = launched(
        "conv1d", q, matmul.pack_conv_weight(weight), torch.ones(columns), None,
        kernel, stride, None, None, 0.0, False, torch.float32, config=SMALL,
    )  # fmt: skip
    expected = F.conv1d(
        q.transpose(1, 2).double(), weight.double(), None, stride
    )
    assert torch.equal(found.cpu().double(), expected.transpose(1, 2))


@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(
    ("has_norm", "dtype"), [(False, torch.int8), (True, torch.bfloat16)]
)
def test_convolution(geometry, has_norm, dtype, equals_reference):
    batch, frames, channels, columns, kernel, stride = geometry
    weight = matmul.pack_conv_weight(_int8(columns, channels, kernel))
    equals_reference(
        "conv1d", _int8(batch, frames, channels), weight,
        torch.rand(columns) * 1e-3, torch.randn(columns), kernel, stride,
        *_norm(columns, has_norm), 1e-5, True, dtype, 40.0, 127, -113,
        config=None if has_norm else SMALL,
    )  # fmt: skip


@pytest.mark.parametrize("tile", _sizes(96, 120, True), ids=str)
def test_every_tile_of_whole_rows(tile, equals_reference):
    equals_reference(
        "conv1d", _int8(2, 80, 40), _int8(96, 120), torch.rand(96) * 1e-3,
        torch.randn(96), 3, 2, *_norm(96), 1e-5, True, torch.int8, 40.0, 127,
        config=tile,
    )  # fmt: skip


def test_refuses_what_it_cannot_compute(device):
    q = torch.empty(1, 2, 16, dtype=torch.int8, device=device)
    weight = torch.empty(8, 48, dtype=torch.int8, device=device)
    one = torch.ones(8, device=device)
    rest = (None, None, 0.0, False, torch.int8)
    with pytest.raises(ValueError, match="2 frames are fewer than the ker"):
        matmul.launch_conv(q, weight, one, None, 3, 2, *rest)
    with pytest.raises(TypeError, match="q must be int8, got torch"):
        matmul.launch_conv(q.float(), weight, one, None, 2, 2, *rest)
    with pytest.raises(ValueError, match="q must be contiguous"):
        matmul.launch_conv(q.transpose(1, 2), weight, one, None, 2, 2, *rest)
