"""Exact float32 products, also on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


def _allows_tf32(backend) -> bool:
    # From torch 2.9 on the older attribute raises where a program has set
    # both of them.
    newer = getattr(backend, "fp32_precision", None)
    return backend.allow_tf32 if newer is None else newer == "tf32"


def allows_tf32() -> tuple[bool, bool]:
    """Whether products and convolutions on a GPU may use TensorFloat-32."""
    cudnn = torch.backends.cudnn
    return (
        _allows_tf32(torch.backends.cuda.matmul),
        _allows_tf32(getattr(cudnn, "conv", cudnn)),
    )


@contextmanager
def full_float32() -> Iterator[None]:
    """Context without TensorFloat-32, which SpeechBrain allows on import."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = allows_tf32()
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = kept


@contextmanager
def plain_float32(x: torch.Tensor) -> Iterator[None]:
    """Context without autocast and, on a GPU, without TensorFloat-32."""
    exact = full_float32() if x.is_cuda else nullcontext()
    with torch.autocast(x.device.type, enabled=False), exact:
        yield
