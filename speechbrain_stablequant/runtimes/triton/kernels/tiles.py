"""Which tile a kernel should run with, estimated from the card's limits.

The estimate: a multiprocessor works off its share of the tiles one after the
other, and each takes as long as its products or its loads, whichever is longer.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import triton

from .architectures import Card

#: Bytes per cycle that it loads from the L2 cache, in practice.
LOADED_BYTES = 40
#: Launch option of every kernel. Triton 3.10 will no longer fuse by default,
#: and a GELU would take twice the instructions.
FUSED = {"enable_fp_fusion": True}
#: int32 sums of a thread; more of them would spill registers.
_MAX_SUMS = 128


@dataclass(frozen=True)
class Config:
    """A tile and how it is run."""

    block_m: int  # rows of the result
    block_n: int  # columns of the result
    block_k: int  # of the reduction in one step
    num_warps: int
    num_stages: int  # steps in flight at once
    persistent: bool = False  # whether a block computes one tile after another
    gluon: bool = False  # whether of ``hopper``, used only after its trial

    @property
    def outline(self) -> tuple[int, int, int, bool]:
        """What its forms (steps, stages, persistence) have in common."""
        return self.block_m, self.block_n, self.num_warps, self.gluon

    def shared_bytes(self, card: Card) -> int:
        """Shared memory of the int8 operands."""
        step = (self.block_m + self.block_n) * self.block_k
        return card.buffers(self.num_stages) * step

    def options(self) -> dict[str, int]:
        """Constants and launch options of a kernel for this tile."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **FUSED,
        }


def shape_bucket(size: int) -> int:
    """Rounds up to 64, 96, 128, 192, 256 ...: shapes that share a tile."""
    power = 64
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power


@functools.lru_cache(4096)
def generate(
    card: Card,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    steps: tuple[int, ...],
    shared: Callable[[Config, Card], int] = Config.shared_bytes,
    sums: int = _MAX_SUMS,
) -> tuple[Config, ...]:
    """The tiles of some sizes that a card can run, the larger first, of equal
    ones that with up to 64 sums in a thread: with as many stages as fit, also
    such that two share a multiprocessor.

    ``shared`` computes the shared memory of a tile, ``sums`` limits those of a
    thread. Raises if there is none.
    """
    found: dict[Config, None] = {}
    largest = max(rows) * max(columns) // (32 * min(card.warps))
    least = min(sums // 4, largest)
    for m, n, warps, k in product(rows, columns, card.warps, steps):
        if not least <= m * n // (32 * warps) <= sums:
            continue
        if not card.allows(m, warps):
            continue
        for room in (card.shared_bytes, card.shared_bytes // 2):
            for stages in range(card.architecture.stages, 1, -1):
                tile = Config(m, n, k, warps, stages)
                if shared(tile, card) <= room:
                    found[tile] = None
                    break
    if not found:
        raise ValueError(
            f"no tile of this kernel fits into {card.shared_bytes} bytes of "
            "shared memory; use backend: torch on this device"
        )

    def order(tile: Config) -> tuple[int, int, bool]:
        m, n, warps, _ = tile.outline
        return -m * n, -m, m * n > 64 * 32 * warps

    return tuple(sorted(found, key=order))


def rank(
    tiles: Iterable[Config], rows: int, columns: int, card: Card
) -> list[Config]:
    """Sorts the tiles of an int8 product, the fastest by estimate first; of
    equal ones the first stays first. ``rows`` and ``columns`` are those of the
    result."""

    def cycles(tile: Config) -> float:
        """Of the busiest multiprocessor, for one step of the reduction."""
        m, n = tile.block_m, tile.block_n
        blocks = triton.cdiv(rows, m) * triton.cdiv(columns, n)
        share = triton.cdiv(blocks, card.processors)
        products = m * n / card.architecture.products
        return share * max(products, (m + n) / LOADED_BYTES)

    return sorted(tiles, key=cycles)
