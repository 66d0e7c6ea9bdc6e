"""safetensors whose bytes depend on their content alone.

The library writes the entries of the metadata in an order that changes from
one process to the next. Here they are sorted.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save


def tensors_to_bytes(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> bytes:
    """A safetensors file as bytes.

    Arguments
    ---------
    tensors : Mapping
        Tensors by name, on any device; the order does not matter.
    metadata : Mapping
        Text by name; the order does not matter.

    Returns
    -------
    bytes

    Example
    -------
    >>> data = tensors_to_bytes({"a": torch.ones(1)}, {"x": "1", "b": "2"})
    >>> load(data)
    {'a': tensor([1.])}
    >>> data == tensors_to_bytes({"a": torch.ones(1)}, {"b": "2", "x": "1"})
    True
    """
    own = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in tensors.items()
    }
    return with_metadata(save(own), metadata)


def with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with another metadata.

    Arguments
    ---------
    data : bytes
        Of the file.
    metadata : Mapping
        Text by name.

    Returns
    -------
    bytes

    Example
    -------
    >>> data = tensors_to_bytes({"a": torch.ones(1)}, {})
    >>> metadata_of(with_metadata(data, {"b": "2"}))
    {'b': '2'}
    """
    rows, start = _header(data)
    rows.pop("__metadata__", None)
    if metadata:
        rows = {"__metadata__": dict(sorted(metadata.items())), **rows}
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    size = len(text).to_bytes(8, "little")
    return b"".join((size, text, memoryview(data)[start:]))


def tensors_digest(data: bytes) -> str:
    """Identifies the tensors of a safetensors file.

    Arguments
    ---------
    data : bytes
        Of the file.

    Returns
    -------
    str
        64 hexadecimal digits: names, shapes and values count, the metadata
        does not.

    Example
    -------
    >>> one = tensors_to_bytes({"a": torch.ones(1)}, {})
    >>> two = tensors_to_bytes({"a": torch.ones(1)}, {"b": "2"})
    >>> tensors_digest(one) == tensors_digest(two)
    True
    """
    rows, start = _header(data)
    rows.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode())
    digest.update(memoryview(data)[start:])
    return digest.hexdigest()


def bytes_to_tensors(
    data: bytes,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Arguments
    ---------
    data : bytes
        Of the file.

    Returns
    -------
    dict
        Tensors by name.
    dict
        The metadata.

    Raises
    ------
    ValueError
        The data is something else.

    Example
    -------
    >>> data = tensors_to_bytes({"a": torch.ones(1)}, {"b": "2"})
    >>> bytes_to_tensors(data)
    ({'a': tensor([1.])}, {'b': '2'})
    >>> bytes_to_tensors(data[:-1])
    Traceback (most recent call last):
    ValueError: no safetensors file: ...
    """
    try:
        return load(data), metadata_of(data)
    except (SafetensorError, OverflowError, MemoryError) as error:
        raise ValueError(f"no safetensors file: {error}") from error


def metadata_of(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, without reading its tensors.

    Arguments
    ---------
    data : bytes
        Of the file.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        The data is something else.

    Example
    -------
    >>> metadata_of(tensors_to_bytes({}, {"b": "2"}))
    {'b': '2'}
    """
    rows, _ = _header(data)
    found = rows.get("__metadata__", {})
    if not isinstance(found, dict) or not all(
        isinstance(value, str) for value in found.values()
    ):
        raise ValueError("no safetensors file: metadata that is no text")
    return found


def _header(data: bytes) -> tuple[dict, int]:
    """The rows of the header, and where the tensors begin."""
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > len(data):
        raise ValueError("no safetensors file: it ends in its header")
    try:
        rows = json.loads(data[8:start])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no safetensors file: {error}") from error
    if not isinstance(rows, dict):
        raise ValueError("no safetensors file: its header is no object")
    return rows, start
