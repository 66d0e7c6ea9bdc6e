"""Which tile a kernel should run with, estimated from the card's limits.

The estimate: a multiprocessor works off its share of the tiles one after the
other, and each takes as long as its products or its loads, whichever is longer.
"""

import functools
from collections.abc import Callable, Sequence
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
    """A tile and how it is run."""

    block_m: int  # rows of the result
    block_n: int  # columns of the result
    block_k: int  # of the reduction in one step
    num_warps: int
    num_stages: int  # steps whose operands are in shared memory at once
    persistent: bool = False  # whether a block computes one tile after another

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
    """What the estimate needs to know about a card."""

    processors: int
    shared_bytes: int  # that a block may use
    products: int  # of int8, that a multiprocessor finishes per cycle


#: Assumed where there is no card to ask: an A100's.
ASSUMED = Limits(108, 163 * 1024, 2048)


@functools.cache
def _card_limits(device: torch.device) -> Limits:
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Limits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        _PRODUCTS.get(capability, _OTHER_PRODUCTS),
    )


def device_limits(device: torch.device) -> Limits:
    """Limits of a tensor's device."""
    return _card_limits(device) if device.type == "cuda" else ASSUMED


def shape_bucket(size: int) -> int:
    """Rounds up to 64, 96, 128, 192, 256 ...: shapes that share a tile."""
    power = 64
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power


def sort_fitting(
    tiles: Sequence[Config],
    limits: Limits,
    shared: Callable[[Config], int],
    cycles: Callable[[Config], float],
) -> list[Config]:
    """The tiles that fit into shared memory, the fastest by estimate first;
    raises if there is none."""
    fitting = [tile for tile in tiles if shared(tile) <= limits.shared_bytes]
    if not fitting:
        raise ValueError(
            f"no tile of this kernel fits into {limits.shared_bytes} bytes of "
            "shared memory; use backend: torch on this device"
        )
    return sorted(fitting, key=cycles)


@functools.lru_cache(4096)
def rank(
    tiles: tuple[Config, ...], rows: int, columns: int, limits: Limits
) -> list[Config]:
    """Sorts the tiles of an int8 product, see `sort_fitting`; of equal ones the
    first stays first. ``rows`` and ``columns`` are those of the result."""

    def cycles(tile: Config) -> float:
        """Of the busiest multiprocessor, for one step of the reduction."""
        m, n = tile.block_m, tile.block_n
        blocks = triton.cdiv(rows, m) * triton.cdiv(columns, n)
        share = triton.cdiv(blocks, limits.processors)
        return share * max(m * n / limits.products, (m + n) / _LOADED_BYTES)

    return sort_fitting(tiles, limits, Config.shared_bytes, cycles)
