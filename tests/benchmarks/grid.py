"""Runs a benchmark at many sizes, each in a process of its own: one table.

Sizes that are done are kept in the folder, so that a run that was stopped, or
had no time left, goes on. The most telling sizes come first.

Example
-------
python tests/benchmarks/grid.py gpu --folder results/gpu
python tests/benchmarks/grid.py gpu --folder results/gpu --minutes 5 \\
    --executors ours_triton,torch_bf16_graphs,torch_fp32  # nothing to compile
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent

Size = tuple[str, float, int]

MODELS = ("hubert-large", "wav2vec2-base")
#: Model, seconds, utterances in a batch: what to know first.
FIRST: tuple[Size, ...] = (
    ("hubert-large", 10.0, 8),
    ("hubert-large", 10.0, 1),
    ("hubert-large", 10.0, 32),
    ("wav2vec2-base", 10.0, 8),
)


def sizes(
    models: Sequence[str], seconds: Sequence[float], batches: Sequence[int]
) -> list[Size]:
    """All sizes, in the order in which they are run."""
    every = list(product(models, seconds, batches))
    return [s for s in FIRST if s in every] + [
        s for s in every if s not in FIRST
    ]


def file_of(folder: Path, size: Size) -> Path:
    """Where the rows of a size are."""
    model, seconds, batch = size
    return folder / f"{Path(model).name}-{seconds:g}s-{batch}.json"


def measure(
    script: str,
    size: Size,
    folder: Path,
    options: Sequence[str],
    minutes: float | None = None,
) -> bool:
    """Runs a script at one size, with more of its options and the ``minutes``
    that are left; whether it ran to its end."""
    model, seconds, batch = size
    unfinished = folder / "unfinished.json"
    limit = [] if minutes is None else ["--minutes", f"{minutes:.3f}"]
    try:
        done = subprocess.run(
            [
                *(sys.executable, str(HERE / f"{script}.py"), "--no-peak"),
                *("--model", model, "--seconds", f"{seconds:g}"),
                *("--batch", str(batch), "--json", str(unfinished)),
                *("--folder", str(folder / "files"), *limit, *options),
            ],
            check=False,
            timeout=None if minutes is None else 60 * minutes,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == 0:
        unfinished.replace(file_of(folder, size))
    return done.returncode == 0


def _cell(row: Mapping | None, base: float | None) -> str:
    """Milliseconds, and how often the first executor fits into them."""
    if row is None:
        return ""
    if row["median_ms"] is None:
        return "failed"
    text = f"{row['median_ms']:.2f}"
    return text if base is None else f"{text} ({row['median_ms'] / base:.2f}x)"


def table(found: Mapping[Size, Mapping]) -> str:
    """Markdown: an executor in each row, a size in each column; median
    milliseconds and, in brackets, times of the first executor's."""
    rows = {
        size: {row["executor"]: row for row in content["rows"]}
        for size, content in found.items()
    }
    names = list(dict.fromkeys(name for r in rows.values() for name in r))
    head = [f"{Path(m).name} {s:g} s x {b}" for m, s, b in rows]
    lines = [
        "| " + " | ".join(["median ms", *head]) + " |",
        "|" + "---|" * (len(head) + 1),
    ]
    bases = {
        size: next(iter(by_name.values()))["median_ms"]
        for size, by_name in rows.items()
    }
    for name in names:
        cells = [_cell(r.get(name), bases[size]) for size, r in rows.items()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _machines(found: Mapping[Size, Mapping]) -> Iterator[str]:
    seen = {json.dumps(content["machine"]) for content in found.values()}
    for text in sorted(seen):
        about = json.loads(text)
        yield ", ".join(f"{key}: {value}" for key, value in about.items())


def main(argv: Sequence[str] | None = None) -> str:
    """Runs what is missing, prints the table and returns it."""
    parser = argparse.ArgumentParser(
        epilog="Other options are those of the script."
    )
    parser.add_argument("script", choices=["gpu", "cpu"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument(
        "--lengths", nargs="+", type=float, default=[5, 10, 20, 30]
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument(
        "--minutes", type=float, help="nothing runs after so many"
    )
    args, options = parser.parse_known_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    wanted = sizes(args.models, args.lengths, args.batches)
    for number, size in enumerate(wanted, start=1):
        if file_of(args.folder, size).exists():
            continue
        left = None
        if args.minutes is not None:
            left = args.minutes - (time.monotonic() - started) / 60
            if left <= 0:
                print(f"{args.minutes:g} minutes are over", file=sys.stderr)
                break
        print(f"{number} of {len(wanted)}: {size}", file=sys.stderr, flush=True)
        if not measure(args.script, size, args.folder, options, left):
            print(f"{size}: failed", file=sys.stderr, flush=True)
    found = {
        size: json.loads(file_of(args.folder, size).read_text())
        for size in wanted
        if file_of(args.folder, size).exists()
    }
    if not found:
        sys.exit("grid.py: no size was measured; see the errors above")
    text = "\n\n".join([*_machines(found), table(found)])
    print(text)
    return text


if __name__ == "__main__":
    main()
