"""The quantize kernel equals ``affine.quantize`` bit for bit."""

import pytest
import torch

from speechbrain_stablequant.core import affine
from speechbrain_stablequant.runtimes.triton.kernels import quantize

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("bits", range(2, 9))
def test_ties_and_saturation(bits, launched):
    scale = torch.tensor(0.37)
    steps = torch.arange(-300, 300) * 0.25  # every fourth or second is a tie
    x = torch.cat([steps * scale, torch.tensor([0.0, -0.0, 1e30, -1e30])])
    found = launched("quantize", x, float(1.0 / scale), affine.qmax(bits))
    assert torch.equal(found.cpu(), affine.quantize(x, scale, bits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float])
@pytest.mark.parametrize(
    ("shape", "gap"),
    [((1, 1), 0), ((7, 33), 5), ((3, 5, 70), 2), ((2, 1500), 0)],
)
def test_shapes_and_strides(dtype, shape, gap, surrounded):
    x = torch.randn(shape).to(dtype)
    scale = torch.tensor(0.0213)
    found = quantize.launch(surrounded(x, gap), float(1.0 / scale), 127)
    assert torch.equal(found.cpu(), affine.quantize(x, scale, 8))


@pytest.mark.parametrize("zero", [0, -113])
def test_gelu(zero, equals_reference):
    equals_reference("quantize", torch.randn(9, 130) * 3, 31.7, 127, True, zero)


@pytest.mark.parametrize("steps", [26, -31])
def test_offset(steps, launched):
    """Both ends of the range, and ties, which a power of two keeps."""
    scale = torch.tensor(0.25)
    x = torch.arange(-300, 300) * 0.25 * scale + steps * scale
    found = launched("quantize", x, 4.0, 31, zero=-steps)
    expected = affine.quantize(x - steps * scale, scale, 6)
    assert torch.equal(found.cpu(), expected)
    assert found.min() == -31 and found.max() == 31


def test_refuses_columns_that_are_not_contiguous(device):
    x = torch.empty(8, 8, device=device).T
    with pytest.raises(ValueError, match="make it contiguous"):
        quantize.launch(x, 1.0, 127)
