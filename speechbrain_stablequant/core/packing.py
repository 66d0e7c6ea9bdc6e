"""Integers of 2 to 8 bits as bytes on disk, b bits each.

Eight values of b bits make one word of b bytes, lowest bits first, so that 6
bits take exactly 6 bits. Values of 8 bits are stored as they are.
"""

import numpy as np
import torch

from ..utils.memory import transient
from .affine import qmax

# Values per word.
_GROUP = 8
# Words unpacked at a time, to keep temporaries small.
_ROWS = 1 << 13


def packed_size(count: int, bits: int) -> int:
    """Returns the number of bytes that packed values take."""
    qmax(bits)
    return count if bits == 8 else -(-count // _GROUP) * bits


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs int8 values of any shape: int8 as they are for 8 bits, else flat
    uint8."""
    size = packed_size(values.numel(), bits)
    if values.dtype != torch.int8:
        raise ValueError(f"only int8 can be packed, not {values.dtype}")
    if bits == 8:
        return values
    flat = values.reshape(-1)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if flat.numel() and not (least <= flat.min() and flat.max() <= most):
        raise ValueError(
            f"values from {int(flat.min())} to {int(flat.max())} do not fit "
            f"in {bits} bits"
        )
    # Two's complement; the last group is padded with zeros.
    codes = torch.zeros(size // bits * _GROUP, dtype=torch.int64)
    codes[: flat.numel()] = flat.long() & (2**bits - 1)
    words = (codes.view(-1, _GROUP) << _shifts(bits, _GROUP)).sum(1)
    return _split(words, 8, bits).to(torch.uint8).reshape(-1)


def check_packed(packed: torch.Tensor, bits: int, shape: torch.Size) -> None:
    """Raises unless a tensor, possibly on ``meta``, has the dtype and size of
    packed values."""
    size = packed_size(shape.numel(), bits)
    dtype = torch.int8 if bits == 8 else torch.uint8
    if packed.dtype != dtype or packed.numel() != size:
        raise ValueError(
            f"{shape.numel()} values of {bits} bits are {size} x {dtype}, "
            f"not {packed.numel()} x {packed.dtype}"
        )


def unpack(packed: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    """Restores the int8 values that :func:`pack` packed."""
    shape = torch.Size(shape)
    check_packed(packed, bits, shape)
    if bits == 8:
        return packed.reshape(shape)
    rows = packed.cpu().view(-1, bits).numpy()
    out = transient((len(rows), _GROUP), torch.int8)
    for start in range(0, len(rows), _ROWS):
        stop = start + _ROWS
        _unpack_rows(rows[start:stop], bits, out[start:stop].numpy())
    return out.view(-1)[: shape.numel()].view(shape).to(packed.device)


def _unpack_rows(rows: np.ndarray, bits: int, out: np.ndarray) -> None:
    """[n, bits] bytes to [n, 8] values; five times as fast as by torch."""
    parts = np.ascontiguousarray(rows.T).astype(np.int16)
    sign = 2 ** (bits - 1)
    for place in range(_GROUP):
        byte, shift = divmod(place * bits, 8)
        code = parts[byte] >> shift
        if shift + bits > 8:
            code |= parts[byte + 1] << (8 - shift)
        code &= 2**bits - 1
        # Sign-extend: flip the sign bit, then subtract it.
        code ^= sign
        code -= sign
        out[:, place] = code


def _shifts(bits: int, count: int) -> torch.Tensor:
    return torch.arange(count) * bits


def _split(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Cuts each word into parts of so many bits: [words, count]."""
    return (words[:, None] >> _shifts(bits, count)) & (2**bits - 1)
