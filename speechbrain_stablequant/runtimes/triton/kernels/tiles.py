"""Which tile a kernel should run with, estimated from the card's limits.

The estimate: a multiprocessor works off its share of the tiles one after the
other, and each takes as long as its products or its loads, whichever is longer.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton

#: int8 products that a multiprocessor finishes per cycle, by capability.
_PRODUCTS = {(8, 0): 2048, (9, 0): 4096}
_OTHER_PRODUCTS = 1024
#: Bytes per cycle that it loads from the L2 cache, in practice.
_LOADED_BYTES = 40


@dataclass(frozen=True)
class Config:
    """A tile and how it is run.

    Arguments
    ---------
    block_m, block_n, block_k : int
        Rows, columns and reduction of one step.
    num_warps : int
        Warps of a block.
    num_stages : int
        Steps whose operands are in shared memory at once.
    persistent : bool
        Whether a block computes one tile after the other.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    persistent: bool = False

    def shared_bytes(self) -> int:
        """Shared memory of the int8 operands."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k

    def options(self) -> dict[str, int]:
        """Constants and launch options of a kernel for this tile."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Limits:
    """What the estimate needs to know about a card.

    Arguments
    ---------
    processors : int
        Streaming multiprocessors.
    shared_bytes : int
        Shared memory that a block may use.
    products : int
        int8 products that a multiprocessor finishes per cycle.
    """

    processors: int
    shared_bytes: int
    products: int


#: An A100: assumed where there is no card to ask.
_A100 = Limits(108, 163 * 1024, 2048)
_assumed: ContextVar[Limits] = ContextVar("limits", default=_A100)


@contextmanager
def assume_limits(limits: Limits) -> Iterator[None]:
    """Context in which tiles are chosen for a card that is not present."""
    token = _assumed.set(limits)
    try:
        yield
    finally:
        _assumed.reset(token)


@functools.cache
def _card_limits(index: int) -> Limits:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Limits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        _PRODUCTS.get(capability, _OTHER_PRODUCTS),
    )


def device_limits(device: torch.device) -> Limits:
    """Limits of a CUDA device; on any other device those of `assume_limits`."""
    if device.type != "cuda":
        return _assumed.get()
    index = device.index
    return _card_limits(torch.cuda.current_device() if index is None else index)


def shape_bucket(size: int) -> int:
    """Rounds up to 64, 96, 128, 192, 256 ...: shapes that share a tile."""
    power = 64
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power


def rank(
    candidates: Sequence[Config],
    rows: int,
    columns: int,
    device: torch.device,
) -> list[Config]:
    """Orders the candidates that fit, the fastest by estimate first.

    Arguments
    ---------
    candidates : sequence of Config
        In order of preference where the estimate is equal.
    rows, columns : int
        Of the result.
    device : torch.device
        Where the kernel runs.

    Returns
    -------
    list of Config
        Those that fit into shared memory; at least one.

    Raises
    ------
    ValueError
        None fits.
    """
    return list(
        _ranked(tuple(candidates), rows, columns, device_limits(device))
    )


@functools.lru_cache(4096)
def _ranked(
    candidates: tuple[Config, ...], rows: int, columns: int, limits: Limits
) -> tuple[Config, ...]:
    shared = limits.shared_bytes
    fitting = [c for c in candidates if c.shared_bytes() <= shared]
    if not fitting:
        raise ValueError(
            f"no tile of this kernel fits into {shared} bytes of shared "
            "memory; use backend: torch on this device"
        )

    def cycles(config: Config) -> float:
        """Of the busiest multiprocessor, for one step of the reduction."""
        m, n = config.block_m, config.block_n
        tiles = triton.cdiv(rows, m) * triton.cdiv(columns, n)
        share = triton.cdiv(tiles, limits.processors)
        return share * max(m * n / limits.products, (m + n) / _LOADED_BYTES)

    return tuple(sorted(fitting, key=cycles))
