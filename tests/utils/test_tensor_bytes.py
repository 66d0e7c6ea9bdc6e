"""Tests of speechbrain_stablequant.utils.tensor_bytes."""

import pytest
import torch

from speechbrain_stablequant.utils.tensor_bytes import (
    bytes_to_tensors,
    metadata_of,
    tensors_digest,
    tensors_to_bytes,
    with_metadata,
)

TENSORS = {"a": torch.ones(1)}


def test_bytes_do_not_depend_on_the_order_of_metadata():
    one = tensors_to_bytes(TENSORS, {"x": "1", "b": "2"})
    assert one == tensors_to_bytes(TENSORS, {"b": "2", "x": "1"})
    assert bytes_to_tensors(one) == (TENSORS, {"b": "2", "x": "1"})


def test_the_digest_ignores_metadata():
    data = tensors_to_bytes(TENSORS, {})
    other = with_metadata(data, {"b": "2"})
    assert metadata_of(other) == {"b": "2"}
    assert tensors_digest(other) == tensors_digest(data)
    zeros = tensors_to_bytes({"a": torch.zeros(1)}, {})
    assert tensors_digest(zeros) != tensors_digest(data)


def test_damaged_data():
    data = tensors_to_bytes(TENSORS, {})
    for part in (data[:-1], data[:12], b"", b"12345678"):
        with pytest.raises(ValueError, match="no safetensors file"):
            bytes_to_tensors(part)
