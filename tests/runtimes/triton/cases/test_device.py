"""Device functions by themselves."""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from speechbrain_stablequant.runtimes.triton.kernels.device import gelu_erf


@triton.jit
def _gelu_kernel(x, out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, gelu_erf(tl.load(x + place)))


def _gelu(x: torch.Tensor, device: str) -> torch.Tensor:
    x = x.to(device)
    out = torch.full_like(x, float("nan"))
    _gelu_kernel[(len(x) // 1024,)](x, out, BLOCK=1024)
    return out.cpu()


def test_gelu_is_the_exact_one(device):
    x = torch.linspace(-16, 16, 2**17)
    error = _gelu(x, device).double() - F.gelu(x.double())
    assert error.abs().max() < 1e-6


def test_gelu_of_large_values(device):
    x = torch.logspace(1, 18, 1024)
    assert torch.equal(_gelu(x, device), x)
    assert _gelu(-x, device).abs().max() < 1e-20
