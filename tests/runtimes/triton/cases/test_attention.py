"""Attention over real frames."""

import os

import pytest
import torch

from speechbrain_stablequant.runtimes.triton.kernels import attention
from speechbrain_stablequant.runtimes.triton.kernels.tiles import Config

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
#: (batch, frames, heads, channels of a head), dtype, dtype of the result
CASES = [
    ((1, 1, 1, 16), FLOAT, FLOAT),
    ((2, 33, 2, 16), HALF, torch.int8),
    ((1, 70, 2, 24), FLOAT, FLOAT),
    ((3, 64, 1, 64), HALF, HALF),
    pytest.param(
        *((2, 33, 1, 64), BRAIN, BRAIN),
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") == "1",
            reason="Triton's interpreter has no product of bfloat16",
        ),
    ),
]


def _real(shape, masked):
    """All frames, or lengths from one frame on."""
    batch, frames = shape[:2]
    if not masked:
        return torch.full((batch,), frames)
    return torch.tensor([1 + (frames - 1) * i // batch for i in range(batch)])


@pytest.mark.parametrize(("shape", "dtype", "out"), CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_sdpa(shape, masked, dtype, out, surrounded, check_close):
    batch, frames, heads, size = shape
    # scores far from zero: a softmax without its maximum would overflow
    qkv = (torch.randn(batch, frames, 3 * heads * size) * 3).to(dtype)
    real = _real(shape, masked)
    # what lies behind the real frames must not matter, however large
    qkv[torch.arange(frames) >= real[:, None]] *= 100
    expected = attention.reference(qkv.float(), heads, real, out, 20.0, 31)
    found = attention.launch(
        surrounded(qkv),
        heads,
        surrounded(real),
        *(out, 20.0, 31),
        config=Config(32, 32, max(16, 1 << (size - 1).bit_length()), 4, 2),
    )
    assert found.shape == expected.shape
    if out.is_floating_point:
        assert found.isfinite().all()
    tolerance = 1e-5 if dtype == FLOAT else torch.finfo(dtype).eps
    for i, count in enumerate(real.tolist()):
        check_close(
            found[i, :count].contiguous(),
            expected[i, :count].contiguous(),
            4 * tolerance,
        )


@pytest.mark.parametrize("n", [128, 64, 32])
@pytest.mark.parametrize("m", [128, 64])
def test_every_tile(m, n, surrounded, check_close):
    qkv = torch.randn(1, 150, 3 * 16)
    real = torch.tensor([131])
    arguments = (1, real, FLOAT)
    found = attention.launch(
        surrounded(qkv), 1, surrounded(real), FLOAT,
        config=Config(m, n, 16, 4, 2),
    )  # fmt: skip
    expected = attention.reference(qkv, *arguments)
    check_close(found[:, :131].contiguous(), expected[:, :131].contiguous())


def test_refuses_what_it_cannot_compute(device):
    qkv = torch.zeros(1, 4, 96, device=device)
    real = torch.tensor([4], device=device)
    with pytest.raises(ValueError, match="96 columns are not those of query"):
        attention.launch(qkv, 5, real, FLOAT)
    with pytest.raises(ValueError, match="qkv must be contiguous"):
        attention.launch(qkv[:, :, :48], 2, real, FLOAT)
    torch.empty(1)  # nothing was allocated on the way
