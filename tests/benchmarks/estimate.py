"""Estimates the triton runtime's time from a card's data sheet, without one.

For each operator and shape: the floor in bytes and operations, the time that
a card of given bandwidth and int8 peak needs for it, the time that the compiled
kernel's instructions take if each scheduler issues one in every cycle, and how
much of a multiprocessor its registers and shared memory let it use.

    python tests/benchmarks/estimate.py --seconds 10 --batch 1 8 32

Another card is one more row of ``CARDS``.

Nothing here is measured. No kernel reaches its floor: launches and waiting come
on top, and where one block has a multiprocessor for itself its instructions
come after its products instead of beside them.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from unittest import mock

from resources import (
    Launch,
    Resources,
    compile_launch,
    launches_of,
    specialize,
)
from shapes import MODELS, SAMPLE_RATE, Op, operators

from speechbrain_stablequant.runtimes.triton.kernels import architectures, tiles


@dataclass(frozen=True)
class Occupied:
    """What a multiprocessor of a compute capability holds."""

    shared_kb: int  # of shared memory; a block may have 1 kB less
    max_warps: int
    max_blocks: int


_BIG, _SMALL = (64, 32), (48, 24)
HOLDS = {
    80: Occupied(164, *_BIG),
    86: Occupied(100, 48, 16),
    89: Occupied(100, *_SMALL),
    90: Occupied(228, *_BIG),
    100: Occupied(228, *_BIG),
    120: Occupied(100, *_SMALL),
}
REGISTERS = 65536
#: Of a multiprocessor; each issues an instruction of a warp in a cycle.
SCHEDULERS = 4


@dataclass(frozen=True)
class Card:
    """Figures of a data sheet, without sparsity."""

    arch: int  # compute capability times ten
    processors: int  # streaming multiprocessors
    bandwidth: float  # of its memory, GB/s
    tops: float  # int8, 10^12 operations a second
    tflops: float  # bfloat16 with float32 sums

    def microseconds(
        self, moved: float, integer_ops: float, float_ops: float
    ) -> float:
        """The longer of moving and computing."""
        computing = integer_ops / self.tops + float_ops / self.tflops
        return max(moved / self.bandwidth * 1e-3, computing * 1e-6)

    @property
    def clock(self) -> float:
        """MHz at which its multiprocessors reach the int8 peak."""
        products = self.processors * self.limits.architecture.products
        return self.tops * 1e6 / (2 * products)

    @property
    def limits(self) -> architectures.Card:
        """As the choice of tiles sees it."""
        row = architectures.ARCHITECTURES[divmod(self.arch, 10)]
        return architectures.Card(row, self.processors)


CARDS = {
    "RTX3090": Card(86, 82, 936, 284, 71),
    "RTX4090": Card(89, 128, 1008, 661, 165),
    "L4": Card(89, 58, 300, 242, 121),
    "A100": Card(80, 108, 2039, 624, 312),
    "H100": Card(90, 132, 3350, 1979, 989),
    "H200": Card(90, 132, 4800, 1979, 989),
    "B200": Card(100, 148, 8000, 4500, 2250),
    "RTX5090": Card(120, 170, 1792, 838, 210),
}


@dataclass(frozen=True)
class Occupancy:
    """How much of a multiprocessor a kernel uses."""

    blocks: int  # that fit at once
    warps: float  # their share of the warps that it can hold
    waves: float  # how often all multiprocessors have to be filled


def occupancy(found: Resources, launch: Launch, card: Card) -> Occupancy:
    """What registers and shared memory allow."""
    arch = HOLDS[card.arch]
    # registers are handed out to a warp by 256, shared memory by 128 bytes,
    # and each block takes 1 kB of it for itself
    per_warp = -(-found.registers * 32 // 256) * 256
    shared = -(-found.shared_bytes // 128) * 128 + 1024
    blocks = min(
        REGISTERS // (per_warp * found.warps),
        arch.shared_kb * 1024 // shared,
        arch.max_warps // found.warps,
        arch.max_blocks,
    )
    waves = launch.blocks / max(blocks * card.processors, 1)
    return Occupancy(blocks, blocks * found.warps / arch.max_warps, waves)


def passes(launch: Launch) -> int:
    """How often a block goes through the loop of its kernel."""
    of = launch.arguments
    match launch.kernel.__name__:
        case "matmul_kernel":
            return -(-of["DEPTH"] // of["BLOCK_K"])
        case "group_conv_kernel":
            return -(-of["TAPS"] // (of["BLOCK_K"] // of["WIDTH"]))
        case "attention_kernel":
            # the last keys are masked, behind the loop
            return of["frames"] // of["BLOCK_N"]
        case "wave_gram_kernel":
            return -(-of["TAPS"] // 2)
    return 0


def issue_microseconds(found: Resources, launch: Launch, card: Card) -> float:
    """Time of a kernel's instructions at one a cycle and scheduler."""
    each = found.instructions + found.loop_instructions * passes(launch)
    total = each * found.warps * launch.blocks
    return total / (card.processors * SCHEDULERS * card.clock)


def choose(op: Op, card: Card) -> Launch:
    """The launch with the tile that the rule chooses for a card."""
    with mock.patch.object(architectures, "ASSUMED", card.limits):
        (launch,) = launches_of(op.launch, *op.arguments)
    return launch


_compiled: dict[tuple, Resources] = {}


def compile_once(launch: Launch, arch: int) -> Resources:
    """Compiles a kernel once for all the shapes that it serves."""
    source = specialize(launch)
    parts = (source.name, source.signature, source.constants, source.attrs)
    key = (arch, *map(str, parts), *launch.options.items())
    if key not in _compiled:
        _compiled[key] = compile_launch(launch, arch, count=True)
    return _compiled[key]


def tile_microseconds(op: Op, card: Card) -> float:
    """Time of all launches of an integer product with the tile that the rule
    chooses: products and loads of the busiest multiprocessor, side by side
    where two steps have a buffer, else one after the other; of others, the
    floor."""
    floor = floors(op, card)[0]
    if not op.integer_ops or "conv 1" in op.name:
        return floor
    launch = choose(op, card)
    m, n = (launch.arguments[f"BLOCK_{axis}"] for axis in "MN")
    share = -(-launch.blocks // card.processors)
    products = m * n / card.limits.architecture.products
    loads = (m + n) / tiles.LOADED_BYTES
    buffers = card.limits.buffers(launch.options["num_stages"])
    step = max(products, loads) if buffers > 1 else products + loads
    return max(share * step * op.shape[2] / card.clock * op.count, floor)


def floors(op: Op, card: Card) -> tuple[float, float]:
    """Microseconds of all launches of an operator: as it is, and with 16 bit in
    the place of int8."""
    int8 = card.microseconds(op.moved_bytes(), op.integer_ops, op.float_ops)
    half = 0.0
    if not op.only_int8:
        every = op.integer_ops + op.float_ops
        half = card.microseconds(op.moved_bytes(integer_size=2), 0.0, every)
    return int8 * op.count, half * op.count


def totals(ops: Sequence[Op], card: Card) -> tuple[float, float]:
    """Sums of the floors of operators."""
    int8, half = zip(*(floors(op, card) for op in ops), strict=True)
    return sum(int8), sum(half)


def _tile(launch: Launch) -> str:
    sizes = (launch.arguments.get(f"BLOCK_{axis}") for axis in "MNK")
    return "x".join(str(size) for size in sizes if size)


def _table(
    title: str, ops: Sequence[Op], name: str, card: Card, compiled: bool
) -> Iterator[str]:
    """The lines for one card, each as soon as its kernel is compiled."""
    total, half_total = totals(ops, card)
    yield (
        f"{title}, {name}: estimate from {card.bandwidth:g} GB/s, "
        f"{card.tops:g} int8 TOPS, {card.tflops:g} bf16 TFLOPS"
    )
    head = (
        f"{'operator':26} {'shape':>18} {'n':>3} {'MB':>8} {'Gop':>8} "
        f"{'us':>8} {'share':>6} {'bf16 us':>8}"
    )
    if compiled:
        head += (
            f" {'issue us':>8}  {'tile':>12} {'regs':>4} {'kB':>4} "
            f"{'blocks':>6} {'warps':>5} {'waves':>6}"
        )
    yield head
    longer = 0.0
    for op in ops:
        int8_us, half_us = floors(op, card)
        gop = (op.integer_ops + op.float_ops) * op.count * 1e-9
        line = (
            f"{op.name:26} {'x'.join(map(str, op.shape)):>18} {op.count:3} "
            f"{op.moved_bytes() * op.count * 1e-6:8.1f} {gop:8.1f} "
            f"{int8_us:8.1f} {int8_us / total:6.1%} {half_us:8.1f}"
        )
        if compiled:
            launch = choose(op, card)
            found = compile_once(launch, card.arch)
            fit = occupancy(found, launch, card)
            issue = issue_microseconds(found, launch, card) * op.count
            longer += max(issue, int8_us)
            line += (
                f" {issue:8.1f}  {_tile(launch):>12} {found.registers:4} "
                f"{found.shared_bytes // 1024:4} {fit.blocks:6} "
                f"{fit.warps:5.0%} {fit.waves:6.2f}"
            )
        yield line
    yield (
        f"{'estimated floor':67} {total:8.1f} {'100.0%':>6} {half_total:8.1f}"
        f"  ideal ratio {half_total / total:.2f}"
    )
    if compiled:
        yield f"{'the longer of it and issue':67} {longer:8.1f}"


def _summary(
    sizes: Sequence[tuple[str, float, int]], cards: Sequence[str]
) -> Iterator[str]:
    """Totals of all models and shapes."""
    yield (
        "estimated milliseconds: floor in int8 / with the chosen tiles / floor "
        "in bf16 / ideal ratio"
    )
    yield f"{'model':14} {'seconds':>7} {'batch':>5} " + " ".join(
        f"{name:>28}" for name in cards
    )
    for model, seconds, batch in sizes:
        ops = operators(model, seconds, batch)
        cells = []
        for name in cards:
            int8, half = (us * 1e-3 for us in totals(ops, CARDS[name]))
            tiled = sum(tile_microseconds(op, CARDS[name]) for op in ops)
            times = f"{int8:6.2f} {tiled * 1e-3:6.2f} {half:7.2f}"
            cells.append(f"{times} {half / int8:5.2f}")
        yield f"{model:14} {seconds:7g} {batch:5} " + " ".join(
            f"{cell:>28}" for cell in cells
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the estimates."""
    parser = argparse.ArgumentParser(
        description="Estimated floors of the triton runtime; nothing is "
        "measured and no GPU is needed."
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=MODELS, default=list(MODELS))
    add("--seconds", nargs="+", type=float, default=[5.0, 10.0, 20.0, 30.0])
    add("--batch", nargs="+", type=int, default=[1, 8, 32])
    add("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    add("--summary", action="store_true", help="totals only")
    add(
        "--no-compile", action="store_true", help="without registers, occupancy"
    )
    options = parser.parse_args(argv)
    if min(options.batch) < 1:
        parser.error("argument --batch: must be at least 1")
    if min(options.seconds) * SAMPLE_RATE < 400:
        parser.error("argument --seconds: must be at least 0.025, one frame")
    sizes = list(product(options.model, options.seconds, options.batch))
    print("Estimates from data sheets; nothing below was measured.\n")
    for size, name in product(() if options.summary else sizes, options.cards):
        title = "{}, {:g} s x {}".format(*size)
        compiled = not options.no_compile
        for line in _table(
            title, operators(*size), name, CARDS[name], compiled
        ):
            print(line, flush=True)
        print()
    print(*_summary(sizes, options.cards), sep="\n")


if __name__ == "__main__":
    main()
