"""Tensors as reproducible bytes: digests, and safetensors files."""

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save


def headed_digest(rows: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Identifies the values of tensors and what stands before each."""
    found = hashlib.sha256()
    for head, tensor in rows:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(head.encode())
        found.update(flat.view(torch.uint8).numpy())
    return found.hexdigest()[:32]


def tensors_to_bytes(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> bytes:
    own = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in tensors.items()
    }
    return with_metadata(save(own), metadata)


def with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    rows, start = _header(data)
    rows.pop("__metadata__", None)
    if metadata:
        rows = {"__metadata__": dict(sorted(metadata.items())), **rows}
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    size = len(text).to_bytes(8, "little")
    return b"".join((size, text, memoryview(data)[start:]))


def tensors_digest(data: bytes) -> str:
    """Identifies names, shapes and values, not the metadata."""
    rows, start = _header(data)
    rows.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode())
    digest.update(memoryview(data)[start:])
    return digest.hexdigest()


def bytes_to_tensors(
    data: bytes,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        return load(data), metadata_of(data)
    except (SafetensorError, OverflowError, MemoryError) as error:
        raise ValueError(f"no safetensors file: {error}") from error


def metadata_of(data: bytes) -> dict[str, str]:
    rows, _ = _header(data)
    found = rows.get("__metadata__", {})
    if not isinstance(found, dict) or not all(
        isinstance(value, str) for value in found.values()
    ):
        raise ValueError("no safetensors file: metadata that is no text")
    return found


def _header(data: bytes) -> tuple[dict, int]:
    """Returns the rows of the header, and where the tensors begin."""
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
