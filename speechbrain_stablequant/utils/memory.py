"""Memory returned to the OS on release."""

import math
import mmap
from collections.abc import Sequence

import torch

_LARGE = 1 << 16  #: tensors of at least this many bytes get their own pages

# Windows does not have or need this flag.
_PRIVATE = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}


def transient(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Allocates a short-lived CPU tensor, uninitialized.

    On the heap it would leave holes between long-lived ones.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    pages = mmap.mmap(-1, size, **_PRIVATE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(*shape)
