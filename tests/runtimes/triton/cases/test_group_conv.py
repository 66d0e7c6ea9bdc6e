"""The positional convolution."""

import pytest
import torch
from torch.nn import functional as F

from speechbrain_stablequant.runtimes.triton.kernels import group_conv
from speechbrain_stablequant.runtimes.triton.kernels.tiles import Config

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

#: batch, frames, channels of a group, outputs of a group, groups, taps, trim
GEOMETRIES = [
    (1, 1, 8, 8, 2, 4, 1),
    (2, 37, 8, 8, 4, 16, 1),
    (3, 21, 12, 12, 2, 7, 0),
    (1, 70, 32, 32, 2, 9, 0),
    (2, 33, 48, 20, 1, 6, 1),
]


def _inputs(geometry):
    batch, frames, channels, columns, groups, taps, _ = geometry
    q = torch.randint(
        -127, 128, (batch, frames, groups * channels), dtype=torch.int8
    )
    weight = torch.randint(
        -127, 128, (groups * columns, channels, taps), dtype=torch.int8
    )
    return q, weight


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sums_are_exact(geometry, launched):
    groups, taps, trim = geometry[4:]
    q, weight = _inputs(geometry)
    found = launched(
        "group_conv1d", q, group_conv.pack_weight(weight, groups),
        torch.ones(weight.shape[0]), None, None, taps // 2, trim, False,
        torch.float32,
    )  # fmt: skip
    expected = F.conv1d(
        q.transpose(1, 2).double(),
        weight.double(),
        padding=taps // 2,
        groups=groups,
    ).transpose(1, 2)[:, : geometry[1]]
    assert torch.equal(found.cpu().double(), expected)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    ("taps_a_step", "dtype"), [(1, torch.float16), (4, torch.bfloat16)]
)
def test_gelu_and_residual(geometry, taps_a_step, dtype, equals_reference):
    groups, taps, trim = geometry[4:]
    q, weight = _inputs(geometry)
    count = weight.shape[0]
    weight = group_conv.pack_weight(weight, groups)
    residual = torch.randn(*q.shape[:2], count).to(dtype)
    equals_reference(
        "group_conv1d", q, weight, torch.rand(count) * 1e-4, torch.randn(count),
        residual, taps // 2, trim, True, dtype,
        config=Config(16, 16, taps_a_step * weight.shape[3], 4, 2),
    )  # fmt: skip


def test_refuses_what_it_cannot_compute(device):
    q = torch.empty(1, 3, 8, dtype=torch.int8, device=device)
    weight = torch.empty(2, 4, 9, 32, dtype=torch.int8, device=device)
    one = torch.ones(8, device=device)
    tail = (False, torch.float32)
    with pytest.raises(
        ValueError, match="5 frames are fewer than the kernel's 9"
    ):
        group_conv.launch(q, weight, one, None, None, 1, 0, *tail)
    with pytest.raises(ValueError, match="8 frames are fewer than"):
        group_conv.launch(q, weight, one, None, None, 3, 1, *tail)
    residual = torch.zeros(1, 4, 8, device=device)
    with pytest.raises(ValueError, match="residual must be contiguous"):
        group_conv.launch(q, weight, one, None, residual, 4, 0, *tail)
