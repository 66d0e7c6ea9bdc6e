"""Reads a safetensors file tensor by tensor; mapped ones stay in memory."""

import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from ..utils.memory import transient
from ..utils.typed import short

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_CHUNK = 1 << 20
#: Limit of elements, so that strides fit int64.
_MOST = 1 << 48


class TensorFile:
    """A safetensors file that stays open: later reads see the same file.

    Threads and forked processes may read concurrently.
    """

    def __init__(self, path: str | Path):
        # safe_open checks the header and the size.
        with safe_open(path, framework="pt", device="cpu") as file:
            self.metadata: dict[str, str] = file.metadata() or {}
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._turn = threading.Lock()
        size = int.from_bytes(self._file.read(8), "little")
        self._start = 8 + size
        self._rows = json.loads(self._file.read(size))
        self._rows.pop("__metadata__", None)
        for name, row in self._rows.items():
            if not name.isprintable():
                raise ValueError(f"a tensor has the name {short(name)}")
            if row["dtype"] not in _DTYPES:
                raise ValueError(f"{short(name)} has dtype {row['dtype']}")
            # An empty tensor of a huge shape passes safetensors' checks.
            if math.prod(max(1, size) for size in row["shape"]) >= _MOST:
                raise ValueError(
                    f"{short(name)} has the shape {short(row['shape'])}"
                )

    def outlines(self) -> dict[str, torch.Tensor]:
        """Returns tensors of the same shapes and dtypes on ``meta``."""
        return {
            name: torch.empty(
                row["shape"], dtype=_DTYPES[row["dtype"]], device="meta"
            )
            for name, row in self._rows.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor into memory of its own."""
        row = self._rows[name]
        out = transient(row["shape"], _DTYPES[row["dtype"]])
        self._fill(name, out.view(-1).view(torch.uint8).numpy(), 0)
        return out

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yields a tensor's bytes in pieces, all in one buffer."""
        begin, end = self._rows[name]["data_offsets"]
        buffer = memoryview(bytearray(min(_CHUNK, end - begin)))
        for start in range(0, end - begin, _CHUNK):
            part = buffer[: min(_CHUNK, end - begin - start)]
            self._fill(name, part, start)
            yield part

    def _fill(self, name: str, buffer, start: int) -> None:
        """Reads bytes of a tensor from an offset into it."""
        place = self._start + self._rows[name]["data_offsets"][0] + start
        view = memoryview(buffer)
        while len(view):
            count = self._read_at(view, place)
            if not count:
                raise OSError(f"{self._file.name}: became shorter")
            view, place = view[count:], place + count

    def _read_at(self, view: memoryview, place: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], place)
        # Windows: the position in the file is shared by threads, but nothing
        # is forked there.
        with self._turn:
            self._file.seek(place)
            return self._file.readinto(view)
