"""The operators as torch sees them: schemas, shapes, torch.compile."""

import pytest
import torch

import speechbrain_stablequant.runtimes.triton.kernels  # noqa: F401
from speechbrain_stablequant.core import affine
from speechbrain_stablequant.runtimes.triton.kernels import group_conv, matmul

OPS = torch.ops.stablequant
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _calls():
    """Name and arguments of a call of each operator."""
    x, vector = torch.randn(2, 9, 32), torch.rand(32)
    q, weight = _int8(2, 9, 32), _int8(32, 32)
    conv_weight = matmul.pack_conv_weight(_int8(32, 32, 3))
    grouped = group_conv.pack_weight(_int8(32, 16, 4), 2)
    wave, taps = torch.randn(2, 100), _int8(32, 10)
    frames = torch.tensor(15)
    real = torch.tensor([9, 4])
    half, int8 = torch.float16, torch.int8
    norm = (vector, vector, 1e-5)
    return {
        "attention": (
            torch.randn(2, 9, 96),
            2,
            real,
            int8,
            9.0,
        ),
        "quantize": (x, 20.0, 31, True, -28),
        "layer_norm": (x, *norm, True, int8, 20.0, 127, -113),
        "layer_norm_both": (x, *norm, half, 20.0, 127),
        "linear": (q, weight, vector, vector, x, True, half),
        "conv1d": (q, conv_weight, vector, None, 3, 2, *norm, True, int8),
        "wave_conv": (
            *(wave, 40.0, 127, taps, vector, vector, 5),
            *(*norm, True, int8, 9.0, 31, -28),
        ),
        "wave_gram": (wave, 40.0, 127, int8, 10, 5, frames),
        "group_conv1d": (q, grouped, vector, vector, x, 2, 1, True, half),
    }


@pytest.fixture(params=sorted(_calls()))
def call(request):
    arguments = _calls()[request.param]
    moved = [
        a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments
    ]
    return getattr(OPS, request.param).default, tuple(moved)


def test_schema_and_shape_function(call):
    torch.library.opcheck(*call, test_utils=("test_schema", "test_faketensor"))


def test_compiles_whole(call):
    operator, arguments = call
    torch.compiler.reset()  # it compiles one function so many times only
    function = torch.compile(
        lambda *args: operator(*args), fullgraph=True, backend="aot_eager"
    )
    found, expected = function(*arguments), operator(*arguments)
    torch.testing.assert_close(found, expected)


def test_quantize_equals_affine():
    x, scale = torch.randn(5, 7), torch.tensor(0.037)
    found = OPS.quantize(x.to(DEVICE), float(1 / scale), 31)
    assert torch.equal(found.cpu(), affine.quantize(x, scale, 6))
    moved = OPS.quantize(x.to(DEVICE), float(1 / scale), 31, False, -28)
    expected = affine.quantize(x - 28 * scale, scale, 6)
    assert torch.equal(moved.cpu(), expected)


def test_rows_that_are_not_int8_are_refused():
    x = torch.randn(2, 8, device=DEVICE)
    one = torch.ones(2, device=DEVICE)
    with pytest.raises(TypeError, match="q must be int8"):
        OPS.linear(x, x, one, None, None, False, torch.float16)
