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
def test_to_int8(shape, gap, dtype, surrounded, check_close):
    x, weight, bias = _inputs(shape, dtype)
    arguments = (1e-5, False, torch.int8, 23.0, 31)
    found = layer_norm.launch(
        surrounded(x, gap), surrounded(weight), surrounded(bias), *arguments
    )
    check_close(found, layer_norm.reference(x, weight, bias, *arguments))


def test_gelu_with_an_offset(surrounded, check_close):
    x, weight, bias = _inputs((6, 77))
    arguments = (1e-5, True, torch.int8, 40.0, 127, -113)
    found = layer_norm.launch(
        surrounded(x), surrounded(weight), surrounded(bias), *arguments
    )
    expected = layer_norm.reference(x, weight, bias, *arguments)
    check_close(found, expected)
    assert expected.min() < -113 and expected.max() > -40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float])
@pytest.mark.parametrize("gelu", [False, True])
def test_to_float(dtype, gelu, surrounded, check_close):
    x, weight, bias = _inputs((6, 77))
    found = layer_norm.launch(
        surrounded(x), surrounded(weight), surrounded(bias), 1e-5, gelu, dtype
    )
    expected = layer_norm.reference(x, weight, bias, 1e-5, gelu, dtype)
    check_close(found, expected)


def test_to_both(surrounded, check_close):
    x, weight, bias = _inputs((4, 3, 40), torch.float16)
    arguments = (1e-5, torch.float16, 40.0, 127, 25)
    placed = [surrounded(t) for t in (x, weight, bias)]
    found = layer_norm.launch_both(*placed, *arguments)
    expected = layer_norm.reference_both(x, weight, bias, *arguments)
    for one, other in zip(found, expected, strict=True):
        check_close(one, other)
