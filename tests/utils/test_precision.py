"""Tests of speechbrain_stablequant.utils.precision."""

from types import SimpleNamespace

import pytest
import torch

from speechbrain_stablequant.utils.precision import allows_tf32, plain_float32


@pytest.fixture(autouse=True)
def tf32():
    """Allowed, as SpeechBrain does on import."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = allows_tf32()
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_neither_autocast_nor_tf32_on_a_gpu():
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    with torch.autocast("cuda", torch.float16), plain_float32(x):
        assert not torch.is_autocast_enabled("cuda")
        assert allows_tf32() == (False, False)
    assert allows_tf32() == (True, True)


def test_a_cpu_leaves_tf32_alone():
    """It has none, and the flags are those of the whole process."""
    with plain_float32(torch.ones(1)):
        assert allows_tf32() == (True, True)


def test_an_error_inside():
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    with pytest.raises(KeyError), plain_float32(x):
        raise KeyError
    assert allows_tf32() == (True, True)
