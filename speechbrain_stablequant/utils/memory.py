"""Memory that goes back to the system as soon as it is no longer used."""

import math
import mmap
from collections.abc import Sequence

import torch

#: Bytes from which on tensors get pages of their own.
_LARGE = 1 << 16

# Windows has no such flag, and no need of it.
_PRIVATE = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}


def transient(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized tensor for what is soon dropped again.

    Taken from the heap, large tensors that come and go between others that
    stay would leave holes: a quarter of what a whole model's weights take.

    Arguments
    ---------
    shape : sequence of int
        Its shape.
    dtype : torch.dtype
        Its dtype.

    Returns
    -------
    torch.Tensor
        On the CPU.

    Example
    -------
    >>> transient((300, 300), torch.int8).zero_().sum().item()
    0
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    pages = mmap.mmap(-1, size, **_PRIVATE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(*shape)
