"""The product kernel, as linear layer and as convolution."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from speechbrain_stablequant.runtimes.triton.kernels import conv, linear, matmul
from speechbrain_stablequant.runtimes.triton.kernels.tiles import Config

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

SMALL = Config(32, 32, 64, 4, 2)

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
def test_sums_are_exact(rows, depth, columns, gap, surrounded):
    q, weight = _int8(rows, depth), _int8(columns, depth)
    one = torch.ones(columns)
    found = linear.launch(
        surrounded(q, gap),
        surrounded(weight),
        surrounded(one),
        None,
        None,
        False,
        torch.float32,
        config=SMALL,
    )
    assert torch.equal(found.cpu().long(), q.long() @ weight.long().T)


def test_worst_case_operands_are_exact(surrounded):
    q = torch.full((33, 1000), -127, dtype=torch.int8)
    weight = torch.full((40, 1000), 127, dtype=torch.int8)
    found = linear.launch(
        surrounded(q),
        surrounded(weight),
        surrounded(torch.ones(40)),
        None,
        None,
        False,
        torch.float32,
    )
    assert torch.equal(found.cpu().long(), q.long() @ weight.long().T)


@pytest.mark.parametrize("rows", [1, 31, 66])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_ends(
    rows, has_bias, has_residual, gelu, dtype, surrounded, check_close
):
    depth, columns = 96, 50
    q, weight = _int8(rows, depth), _int8(columns, depth)
    scale = torch.rand(columns) * 2e-4
    bias = torch.randn(columns) if has_bias else None
    residual = torch.randn(rows, columns).half() if has_residual else None
    end = (gelu, dtype, 21.5, 31)
    expected = linear.reference(q, weight, scale, bias, residual, *end)
    found = linear.launch(
        surrounded(q),
        surrounded(weight),
        surrounded(scale),
        bias if bias is None else surrounded(bias),
        residual if residual is None else surrounded(residual, gap=6),
        *end,
        config=SMALL,
    )
    check_close(found, expected)


@pytest.mark.parametrize("tile", matmul.TILES, ids=str)
def test_every_tile(tile, surrounded, check_close):
    q, weight = _int8(3, 90, 272), _int8(70, 272)
    scale, bias = torch.rand(70) * 1e-4, torch.randn(70)
    end = (True, torch.int8, 30.0, 127, -113)
    found = linear.launch(
        *(surrounded(t) for t in (q, weight, scale, bias)),
        None,
        *end,
        config=tile,
    )
    expected = linear.reference(q, weight, scale, bias, None, *end)
    check_close(found, expected)


@pytest.mark.parametrize("blocks", [1, 3, 7])
@pytest.mark.parametrize("rows", [40, 100])
def test_blocks_that_go_on(rows, blocks, surrounded, check_close, monkeypatch):
    """Fewer blocks than tiles, also such that some have one tile more."""
    monkeypatch.setattr(matmul, "_at_once", lambda tile, device: blocks)
    q, weight = _int8(rows, 192), _int8(70, 192)
    scale, bias = torch.rand(70) * 1e-4, torch.randn(70)
    end = (True, torch.int8, 30.0, 127, -113)
    expected = linear.reference(q, weight, scale, bias, None, *end)
    found = linear.launch(
        *(surrounded(t) for t in (q, weight, scale, bias)),
        None,
        *end,
        config=replace(SMALL, persistent=True),
    )
    check_close(found, expected)


@pytest.mark.parametrize("has_norm", [False, True])
def test_blocks_of_a_convolution_that_go_on(
    has_norm, surrounded, check_close, monkeypatch
):
    monkeypatch.setattr(matmul, "_at_once", lambda tile, device: 2)
    q, weight = _int8(3, 80, 32), _int8(60, 96)
    tensors = [q, weight, torch.rand(60) * 1e-3, torch.randn(60)]
    norm = (torch.randn(60), torch.randn(60)) if has_norm else (None, None)
    tail = (3, 2, *norm, 1e-5, True, torch.int8, 40.0, 127)
    expected = conv.reference(*tensors, *tail)
    if has_norm:
        tail = (3, 2, *map(surrounded, norm), *tail[4:])
    found = conv.launch(
        *map(surrounded, tensors),
        *tail,
        config=Config(16, 64, 32, 4, 2, persistent=True),
    )
    check_close(found, expected)


#: batch, frames, in, out, kernel, stride
CONVOLUTIONS = [
    (1, 3, 16, 8, 3, 2),
    (2, 40, 16, 24, 3, 2),
    (3, 33, 20, 40, 2, 2),
    (2, 70, 32, 32, 5, 1),
    (1, 50, 7, 9, 4, 3),
]


@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_convolution_sums_are_exact(geometry, surrounded):
    batch, frames, channels, columns, kernel, stride = geometry
    q, weight = _int8(batch, frames, channels), _int8(columns, channels, kernel)
    found = conv.launch(
        surrounded(q),
        surrounded(conv.pack_weight(weight)),
        surrounded(torch.ones(columns)),
        None,
        kernel,
        stride,
        None,
        None,
        0.0,
        False,
        torch.float32,
        config=SMALL,
    )
    expected = F.conv1d(
        q.transpose(1, 2).double(), weight.double(), None, stride
    )
    assert torch.equal(found.cpu().double(), expected.transpose(1, 2))


@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_convolution(geometry, has_norm, dtype, surrounded, check_close):
    batch, frames, channels, columns, kernel, stride = geometry
    q, weight = _int8(batch, frames, channels), _int8(columns, channels, kernel)
    tensors = [
        q,
        conv.pack_weight(weight),
        torch.rand(columns) * 1e-3,
        torch.randn(columns),
    ]
    norm = (torch.randn(columns), torch.randn(columns)) if has_norm else None
    tail = (1e-5, True, dtype, 40.0, 127, -113)
    expected = conv.reference(
        *tensors, kernel, stride, *(norm or (None, None)), *tail
    )
    found = conv.launch(
        *map(surrounded, tensors),
        kernel,
        stride,
        *(map(surrounded, norm) if norm else (None, None)),
        *tail,
        config=None if has_norm else SMALL,
    )
    check_close(found, expected)


@pytest.mark.parametrize("m, k, warps, stages", matmul.ROW_TILES)
def test_every_tile_of_whole_rows(m, k, warps, stages, surrounded, check_close):
    q, weight = _int8(2, 80, 40), _int8(96, 120)
    vectors = [torch.rand(96) * 1e-3, *(torch.randn(96) for _ in range(3))]
    scale, bias, norm_weight, norm_bias = vectors
    expected = conv.reference(
        q, weight, scale, bias, 3, 2, norm_weight, norm_bias, 1e-5, True,
        torch.int8, 40.0, 127,
    )  # fmt: skip
    q, weight, scale, bias, norm_weight, norm_bias = map(
        surrounded, (q, weight, *vectors)
    )
    found = conv.launch(
        q, weight, scale, bias, 3, 2, norm_weight, norm_bias, 1e-5, True,
        torch.int8, 40.0, 127, config=Config(m, 128, k, warps, stages),
    )  # fmt: skip
    check_close(found, expected)


def test_refuses_what_it_cannot_compute(device):
    q = torch.empty(1, 2, 16, dtype=torch.int8, device=device)
    weight = torch.empty(8, 48, dtype=torch.int8, device=device)
    one = torch.ones(8, device=device)
    rest = (None, None, 0.0, False, torch.int8)
    with pytest.raises(ValueError, match="2 frames are fewer than the ker"):
        conv.launch(q, weight, one, None, 3, 2, *rest)
    with pytest.raises(TypeError, match="q must be int8, got torch"):
        conv.launch(q.float(), weight, one, None, 2, 2, *rest)
    with pytest.raises(ValueError, match="q must be contiguous"):
        conv.launch(q.transpose(1, 2), weight, one, None, 2, 2, *rest)
