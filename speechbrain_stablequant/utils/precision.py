"""Products of float32 that are products of float32, also on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


def _allows_tf32(backend) -> bool:
    # From torch 2.9 on the older attribute raises where a program has set
    # both of them.
    newer = getattr(backend, "fp32_precision", None)
    return backend.allow_tf32 if newer is None else newer == "tf32"


def allows_tf32() -> tuple[bool, bool]:
    """Whether products and convolutions on a GPU may round their operands to
    10 bits.

    Example
    -------
    >>> with full_float32():
    ...     allows_tf32()
    (False, False)
    """
    cudnn = torch.backends.cudnn
    return (
        _allows_tf32(torch.backends.cuda.matmul),
        _allows_tf32(getattr(cudnn, "conv", cudnn)),
    )


@contextmanager
def full_float32() -> Iterator[None]:
    """Context without TensorFloat-32.

    SpeechBrain allows it on import, for speed. What is to be exact, or a
    reference for something else, is computed without it. On a CPU this
    changes nothing.

    Example
    -------
    >>> torch.backends.cuda.matmul.allow_tf32 = True
    >>> with full_float32():
    ...     torch.backends.cuda.matmul.allow_tf32
    False
    >>> torch.backends.cuda.matmul.allow_tf32
    True
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = allows_tf32()
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = kept


@contextmanager
def plain_float32(x: torch.Tensor) -> Iterator[None]:
    """Context in which everything is computed in the dtype that it has: no
    autocast, and no TensorFloat-32 where the device knows it.

    Arguments
    ---------
    x : torch.Tensor
        On the device that computes.

    Example
    -------
    >>> x = torch.ones(1, 1)
    >>> with torch.autocast("cpu", torch.bfloat16), plain_float32(x):
    ...     (x @ x).dtype
    torch.float32
    """
    exact = full_float32() if x.is_cuda else nullcontext()
    with torch.autocast(x.device.type, enabled=False), exact:
        yield
