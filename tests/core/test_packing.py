"""Packed integers: exact, as small as they say, checked."""

import numpy
import pytest
import torch

from speechbrain_stablequant.core.affine import qmax
from speechbrain_stablequant.core.packing import pack, packed_size, unpack

BITS = range(2, 9)


def bits_of(values: torch.Tensor, bits: int) -> bytes:
    """The same bytes, from strings of zeros and ones."""
    text = "".join(
        format(int(value) % 2**bits, f"0{bits}b")[::-1]
        for value in values.reshape(-1)
    )
    text += "0" * (-len(text) % (8 * bits))
    return bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))


@pytest.mark.parametrize("bits", BITS)
def test_every_value_round_trips(bits):
    values = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    values = values.to(torch.int8)
    assert torch.equal(unpack(pack(values, bits), bits, values.shape), values)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 1), (3, 5, 3), (64, 33)])
def test_round_trip(bits, shape):
    limit = qmax(bits)
    values = torch.randint(-limit, limit + 1, shape, dtype=torch.int8)
    packed = pack(values, bits)
    assert packed.numel() == packed_size(values.numel(), bits)
    back = unpack(packed, bits, values.shape)
    assert back.dtype == torch.int8
    assert torch.equal(back, values)


@pytest.mark.parametrize("bits", range(2, 8))
def test_bytes_are_as_described(bits):
    limit = qmax(bits)
    values = torch.randint(-limit, limit + 1, (5, 7), dtype=torch.int8)
    expected = numpy.frombuffer(bits_of(values, bits), numpy.uint8)
    assert numpy.array_equal(pack(values, bits).numpy(), expected)


@pytest.mark.parametrize("bits", range(2, 8))
def test_so_many_bits_are_taken(bits):
    values = torch.zeros(1024, 1024, dtype=torch.int8)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == values.numel() * bits


def test_eight_bits_are_stored_as_they_are():
    values = torch.tensor([[-127, 0, 127]], dtype=torch.int8)
    assert pack(values, 8) is values


def test_view_of_a_larger_tensor():
    values = torch.randint(-3, 4, (9, 10), dtype=torch.int8).t()
    assert torch.equal(unpack(pack(values, 3), 3, values.shape), values)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("side", [-1, 1])
def test_value_that_needs_more_bits(bits, side):
    value = 2 ** (bits - 1) if side > 0 else -(2 ** (bits - 1)) - 1
    values = torch.tensor([0, value], dtype=torch.int8)
    with pytest.raises(ValueError, match=f"do not fit in {bits} bits"):
        pack(values, bits)


def test_other_dtype():
    with pytest.raises(ValueError, match=r"not torch\.int32"):
        pack(torch.zeros(3, dtype=torch.int32), 4)


@pytest.mark.parametrize("bits", [1, 9, 0, True])
def test_other_widths(bits):
    with pytest.raises(ValueError, match="from 2 to 8"):
        pack(torch.zeros(3, dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", BITS)
def test_wrong_count(bits):
    packed = pack(torch.zeros(16, dtype=torch.int8), bits)
    with pytest.raises(ValueError, match="25 values"):
        unpack(packed, bits, (5, 5))


def test_wrong_dtype_of_packed():
    packed = pack(torch.zeros(16, dtype=torch.int8), 6)
    with pytest.raises(ValueError, match="uint8"):
        unpack(packed.to(torch.int8), 6, (16,))
    with pytest.raises(ValueError, match="int8"):
        unpack(torch.zeros(16, dtype=torch.uint8), 8, (16,))
