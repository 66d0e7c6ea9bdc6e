"""What decides how kernels run on a card: one row for each architecture."""

import functools
from dataclasses import dataclass

import torch
import triton

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


@dataclass(frozen=True)
class Architecture:
    """What cards of one compute capability have in common."""

    shared_kb: int  # that a block may have
    products: int  # of int8, that a multiprocessor finishes per cycle
    instruction: str = "mma.sync"  # of integer products
    # Triton that compiles it right, and the first torch that brings it;
    # earlier ones multiply by mma.sync
    triton: tuple[int, int] = (3, 6)
    torch: str = ""
    stages: int = 4  # steps in flight, at most
    warps: tuple[int, ...] = (4, 8)
    norm_rows: int = 64  # largest tile of whole rows without spilled registers
    # otherwise integers are multiplied as float16, which holds them exactly
    int8_pays: bool = True


#: By compute capability. Before Triton 3.8, wgmma may read shared memory before
#: the copies into it are visible, and tcgen05 has no integers.
ARCHITECTURES = {
    (8, 0): Architecture(163, 2048),
    (8, 6): Architecture(99, 1024),
    (8, 9): Architecture(99, 1024),
    (9, 0): Architecture(227, 4096, "wgmma", (3, 8), "2.14"),
    (10, 0): Architecture(227, 8192, "tcgen05", (3, 8), "2.14", norm_rows=32),
    (10, 3): Architecture(227, 4096, "tcgen05", norm_rows=32, int8_pays=False),
    (12, 0): Architecture(99, 1024),
}


@dataclass(frozen=True)
class Card:
    """A card, as the choice of tiles sees it."""

    architecture: Architecture
    processors: int
    version: tuple[int, int] = VERSION  # of Triton

    @property
    def instruction(self) -> str:
        """The matrix instruction that this Triton compiles right."""
        row = self.architecture
        return row.instruction if self.version >= row.triton else "mma.sync"

    @property
    def races(self) -> bool:
        """Whether this Triton's wgmma must be avoided."""
        return (
            self.architecture.instruction == "wgmma"
            and self.instruction != "wgmma"
        )

    @property
    def warps(self) -> tuple[int, ...]:
        """Warps of a block; two are too few for wgmma."""
        return (
            (2, *self.architecture.warps)
            if self.races
            else (self.architecture.warps)
        )

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block may have."""
        return self.architecture.shared_kb * 1024

    def buffers(self, stages: int) -> int:
        """Buffers in shared memory of a loop with so many stages."""
        ahead = self.instruction == "mma.sync"
        return max(stages - ahead, 1)

    def allows(self, rows: int, warps: int) -> bool:
        """Whether a tile's products are compiled right."""
        return not self.races or rows < 64 or warps < 4

    def remark(self) -> str | None:
        """What of the choice a user should know."""
        row = self.architecture
        if not row.int8_pays:
            return (
                "this card is slow at int8: products are computed in float16 "
                "from the packed weights"
            )
        if self.instruction != row.instruction:
            found = ".".join(map(str, self.version))
            most = " outside of linear layers" if self.races else ""
            return (
                f"Triton {found} does not compile int8 for {row.instruction} "
                f"correctly: the slower mma.sync is used{most}; install torch "
                f"{row.torch} or later"
            )
        return None


#: Assumed where there is no card to ask: an A100.
ASSUMED = Card(ARCHITECTURES[8, 0], 108)


def architecture_of(capability: tuple[int, int]) -> Architecture:
    """The row of a capability, or of the one below it."""
    return ARCHITECTURES[max(k for k in ARCHITECTURES if k <= capability)]


@functools.cache
def _read_card(device: torch.device) -> Card:
    found = torch.cuda.get_device_properties(device)
    row = architecture_of((found.major, found.minor))
    return Card(row, found.multi_processor_count)


def card_of(device: torch.device) -> Card:
    """The card of a tensor."""
    return _read_card(device) if device.type == "cuda" else ASSUMED
