"""The LayerNorm kernel against its reference."""

import pytest
import torch

from speechbrain_stablequant.runtimes.triton.kernels import layer_norm

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

SHAPES = [
    ((1, 1), 0),
    ((5, 48), 3),
    ((3, 7, 100), 0),
    ((2, 1024), 8),
    ((19, 32), 0),
]


def _inputs(shape, dtype=torch.float32):
    channels = shape[-1]
    # a mean far from zero: a variance by subtraction would be lost
    x = (torch.randn(shape) * 2 + 30).to(dtype)
    return x, torch.randn(channels), torch.randn(channels)


@pytest.mark.parametrize(("shape", "gap"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float])
def test_to_int8(shape, gap, dtype, surrounded, equals_reference):
    x, *norm = _inputs(shape, dtype)
    end = (1e-5, False, torch.int8, 23.0, 31)
    equals_reference("layer_norm", surrounded(x, gap), *norm, *end)


def test_gelu_with_an_offset(equals_reference):
    end = (1e-5, True, torch.int8, 40.0, 127, -113)
    expected = equals_reference("layer_norm", *_inputs((6, 77)), *end)
    assert expected.min() < -113 and expected.max() > -40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float])
@pytest.mark.parametrize("gelu", [False, True])
def test_to_float(dtype, gelu, equals_reference):
    equals_reference("layer_norm", *_inputs((6, 77)), 1e-5, gelu, dtype)


def test_to_both(launched, check_close):
    norm = _inputs((4, 3, 40), torch.float16)
    end = (1e-5, torch.float16, 40.0, 127, 25)
    found = launched("layer_norm_both", *norm, *end)
    expected = layer_norm.reference_both(*norm, *end)
    for one, other in zip(found, expected, strict=True):
        check_close(one, other)
