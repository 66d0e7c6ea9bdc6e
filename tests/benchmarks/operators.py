"""Times each operator of the triton runtime against ceilings of the same card.

For each launch of a forward: the time on the device, achieved operations and
bytes a second, and their share of what library calls reach on this card. First
comes one product beside the library's at the same shape.

    python tests/benchmarks/operators.py --model hubert-large --batch 1 8 32
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu import describe
from harness import first_line, machine, require_device
from shapes import MODELS, PRODUCT, Op, operators

from speechbrain_stablequant.runtimes.triton.build import make_tuner
from speechbrain_stablequant.runtimes.triton.kernels.tuning import (
    Tuner,
    time_on_device,
)

_SQUARE = 8192
_COPY = 2**30


@dataclass(frozen=True)
class Ceilings:
    """What library calls reach on the card; None where they do not run."""

    int8_tops: float | None  # torch._int_mm, the best of its shapes
    float8_tops: float | None  # torch._scaled_mm, as fast as int8
    bf16_tops: float  # torch.matmul
    copy_gbs: float  # a large copy, bytes read and written


@dataclass
class Row:
    """One operator at one shape; times are of one launch."""

    model: str
    seconds: float
    batch: int
    operator: str
    shape: tuple[int, ...]
    count: int
    us: float | None = None
    tops: float | None = None
    gbs: float | None = None
    of_compute: float | None = None
    of_bandwidth: float | None = None
    error: str | None = None


def time_us(run: Callable[[], Any], rounds: int) -> float:
    """Median microseconds on the device, with cold caches."""
    return time_on_device(run, rounds) * 1e3


def _best(ops: float, calls: Iterable[Callable], rounds: int) -> float | None:
    """10^12 operations a second of the fastest; None if none runs."""
    found = []
    for call in calls:
        try:
            found.append(time_us(call, rounds))
        except (RuntimeError, NotImplementedError) as error:
            print(f"ceiling left out: {first_line(error)}")
    # infinity: the device cannot run it; zero: the clock saw nothing
    found = [us for us in found if 0 < us < float("inf")]
    return ops / min(found) * 1e-6 if found else None


def measure_ceilings(rounds: int) -> Ceilings:
    """Times library calls on the card."""
    n = _SQUARE
    ops = 2.0 * n**3
    ints = torch.randint(-127, 128, (2, n, n), dtype=torch.int8, device="cuda")
    halves = torch.randn(2, n, n, dtype=torch.bfloat16, device="cuda")
    one = torch.ones((), device="cuda")
    eights = halves.to(torch.float8_e4m3fn)
    source = torch.empty(_COPY, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy_us = time_us(lambda: target.copy_(source), rounds)

    def scaled_mm() -> torch.Tensor:
        return torch._scaled_mm(
            eights[0], eights[1].T, scale_a=one, scale_b=one,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip

    int_mm = (
        lambda: torch._int_mm(ints[0], ints[1].T),
        lambda: torch._int_mm(ints[0], ints[1]),
    )
    return Ceilings(
        int8_tops=_best(ops, int_mm, rounds),
        float8_tops=_best(ops, [scaled_mm], rounds),
        bf16_tops=_best(ops, [lambda: halves[0] @ halves[1].T], rounds),
        copy_gbs=2 * _COPY / copy_us * 1e-3,
    )


def filled(op: Op, device: str) -> tuple:
    """An operator's arguments, of `shapes.operators`, on a device."""
    batch, *_ = op.arguments[0].shape
    frames = {0: op.shape[0] // batch, 1: op.arguments[0].shape[1]}
    return tuple(_fill(a, device, frames) for a in op.arguments)


def _fill(value: Any, device: str, frames: Mapping[int, int]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    shape, dtype = value.shape, value.dtype
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device)
    if dtype == torch.int64:
        # All is real: frames of the output, or those of each utterance.
        real = frames[len(shape)]
        return torch.full(shape, real, dtype=dtype, device=device)
    # Small scales: sums of products must fit into 16 bit.
    return torch.rand(shape, device=device).mul_(1e-3).to(dtype)


def measure(op: Op, row: Row, ceilings: Ceilings, rounds: int) -> None:
    """Fills in the figures of a row."""
    arguments = filled(op, "cuda")
    row.us = time_us(lambda: op.launch(*arguments), rounds)
    if row.us == float("inf"):
        raise RuntimeError("the tile does not fit onto this device")
    row.gbs = op.moved_bytes() / row.us * 1e-3
    row.of_bandwidth = row.gbs / ceilings.copy_gbs
    row.tops = (op.integer_ops + op.float_ops) / row.us * 1e-6
    tops = ceilings.int8_tops if op.integer_ops else ceilings.bf16_tops
    if row.tops and tops:
        row.of_compute = row.tops / tops


def _number(value: float | None, form: str) -> str:
    return "-" if not value else format(value, form)


def line(row: Row) -> str:
    """A row of the table."""
    head = (
        f"{row.operator:26} {'x'.join(map(str, row.shape)):>18} {row.count:3}"
    )
    if row.error is not None:
        return f"{head} FAILED: {row.error}"
    return (
        f"{head} {row.us:9.1f} {_number(row.tops, '.1f'):>8} "
        f"{_number(row.of_compute, '.0%'):>6} {_number(row.gbs, '.0f'):>8} "
        f"{_number(row.of_bandwidth, '.0%'):>6}"
    )


HEADER = (
    f"{'operator':26} {'shape':>18} {'n':>3} {'us':>9} {'TOPS':>8} {'of':>6} "
    f"{'GB/s':>8} {'of':>6}"
)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--model", nargs="+", choices=MODELS, default=list(MODELS))
    add("--seconds", nargs="+", type=float, default=[5.0, 10.0, 20.0, 30.0])
    add("--batch", nargs="+", type=int, default=[1, 8, 32])
    add("--rounds", type=int, default=21)
    add("--no-tune", action="store_true", help="tiles by rule")
    add("--minutes", type=float, help="no size is begun after so many")
    add("--json", help="file for the rows")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the benchmark from the command line."""
    options = _parse(argv)
    require_device("operators.py", "cuda")
    about = {**machine("cuda"), **describe()}
    ceilings = measure_ceilings(options.rounds)
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    print(f"ceilings: {ceilings}")
    # tiles of earlier runs of the runtime are not measured again
    tuner = make_tuner(torch.device("cuda"), not options.no_tune, None)
    rows, begin = [], time.monotonic()
    print(f"\n{HEADER}\n{library_line(ceilings, options.rounds)}")
    first = Row("", 0, 0, *_head(PRODUCT))
    rows.append(_attempt(PRODUCT, first, ceilings, options.rounds, tuner))
    for size in product(options.model, options.seconds, options.batch):
        spent = (time.monotonic() - begin) / 60
        if options.minutes is not None and spent > options.minutes:
            print(f"{options.minutes:g} minutes are over", file=sys.stderr)
            break
        print("\n{}, {:g} s x {}".format(*size), HEADER, sep="\n")
        for op in operators(*size):
            row = Row(*size, *_head(op))
            rows.append(_attempt(op, row, ceilings, options.rounds, tuner))
    if tuner is not None:
        tuner.save()
    if options.json:
        content = {
            "machine": about,
            "ceilings": asdict(ceilings),
            "rows": [asdict(row) for row in rows],
        }
        Path(options.json).write_text(json.dumps(content, indent=1))
    return rows


def _head(op: Op) -> tuple[str, tuple[int, ...], int]:
    return op.name, op.shape, op.count


def _attempt(
    op: Op, row: Row, ceilings: Ceilings, rounds: int, tuner: Tuner | None
) -> Row:
    """Measures, or notes the error, and prints."""
    try:
        with contextlib.nullcontext() if tuner is None else tuner.active():
            measure(op, row, ceilings, rounds)
    # whatever a compiler or a driver raises: the others go on
    except Exception as error:
        row.error = first_line(error)
        torch.cuda.empty_cache()
    print(line(row), flush=True)
    return row


def library_line(ceilings: Ceilings, rounds: int) -> str:
    """The library's own product at the shape of :data:`PRODUCT`."""
    rows, columns, depth = PRODUCT.shape
    a, b = (
        torch.randint(-127, 128, (n, depth), dtype=torch.int8, device="cuda")
        for n in (rows, columns)
    )
    row = Row("", 0, 0, "torch._int_mm", PRODUCT.shape, 1)
    calls = [lambda: torch._int_mm(a, b.T)]
    row.tops = _best(PRODUCT.integer_ops, calls, rounds)
    if row.tops is None:
        row.error = "does not run here"
        return line(row)
    row.us = PRODUCT.integer_ops / row.tops * 1e-6
    if ceilings.int8_tops:
        row.of_compute = row.tops / ceilings.int8_tops
    return line(row)


if __name__ == "__main__":
    main()
