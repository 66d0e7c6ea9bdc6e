"""Tests of speechbrain_stablequant.utils.memory."""

import pytest
import torch

from speechbrain_stablequant.utils.memory import transient


@pytest.mark.parametrize("shape", [(0,), (3, 2), (300, 300)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_shape_and_dtype(shape, dtype):
    tensor = transient(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype
    assert tensor.fill_(1).sum().item() == tensor.numel()
