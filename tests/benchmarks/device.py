"""Runs the steps of ``device.sh``, each in a process of its own with a limit.

A step that fails, is late or lacks something takes nothing from the others.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUDGET = 280.0  #: seconds of a call
LEAST = 15.0  #: seconds below which no step is begun
MODELS = "/tmp/benchmark-models"  #: kept for the second call if it is there


@dataclass(frozen=True)
class Step:
    """One process. ``{carry}`` and ``{out}`` stand for these folders."""

    name: str
    command: tuple[str, ...]
    limit: float  # seconds
    needs: tuple[str, ...] = ()  # that must exist


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    seconds: float = 0.0
    status: str = "done"  # or why it is not


def _script(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE / name), *arguments)


def _speed(model: str, batch: int, executors: str, limit: float) -> Step:
    name = f"{model}-{batch}-{'ours' if 'ours' in executors else 'rivals'}"
    arguments = {
        "--model": model,
        "--seconds": "10",
        "--batch": str(batch),
        "--executors": executors,
        "--minutes": f"{limit / 90:.2f}",
        "--folder": MODELS,
        "--json": f"{{out}}/{name}.json",
    }
    flat = [text for pair in arguments.items() for text in pair]
    return Step(name, _script("gpu.py", *flat, "--no-peak"), limit)


_OURS = "ours_triton,torch_bf16_graphs,torch_fp32"
_RIVALS = "tensorrt_int8,torchao_int8_compile,torchao_float8_compile"
_TESTS = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")

STEPS: dict[str, tuple[Step, ...]] = {
    "first": (
        Step(
            "kernels",
            (*_TESTS, "-nauto", "tests/runtimes/triton/cases"),
            80,
        ),
        Step(
            "every tile",
            _script("every_tile.py", "{carry}/folder"),
            60,
            ("{carry}/folder",),
        ),
        _speed("hubert-large", 8, _OURS, 80),
        _speed("hubert-large", 1, _OURS, 30),
        _speed("hubert-large", 32, _OURS, 40),
        *(_speed("wav2vec2-base", n, _OURS, 20) for n in (1, 8, 32)),
    ),
    "second": (
        Step(
            "error rates",
            _script(
                *("wer.py", "{carry}/folder", "--split", "{carry}/test"),
                *("--device", "cuda", "--backends", "torch", "triton"),
                *("--batches", "8", "--json", "{out}/wer.json"),
            ),
            80,
            ("{carry}/folder", "{carry}/test"),
        ),
        *(_speed("hubert-large", n, _RIVALS, 50) for n in (8, 1)),
        Step(
            "operators",
            _script(
                *("operators.py", "--model", "hubert-large", "--seconds", "10"),
                *("--batch", "8", "--minutes", "1"),
                *("--json", "{out}/operators.json"),
            ),
            80,
        ),
    ),
}


def execute(command: Sequence[str], log: Path, limit: float) -> str:
    """Runs a command with its output in a file; returns its status."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=file, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    if done.returncode == 0:
        return "done"
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    return f"status {done.returncode}: {lines[-1][:200]}"


def run_steps(
    steps: Sequence[Step],
    carry: Path,
    out: Path,
    run: Callable[[Sequence[str], Path, float], str] = execute,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Runs the steps until the budget is spent."""
    begin, outcomes = clock(), []

    def filled(text: str) -> str:
        return text.replace("{carry}", str(carry)).replace("{out}", str(out))

    for step in steps:
        outcome = Outcome(step.name)
        missing = [p for p in map(filled, step.needs) if not Path(p).exists()]
        left = min(step.limit, BUDGET - (clock() - begin))
        start = clock()
        if missing:
            outcome.status = f"skipped: {missing[0]} is not there"
        elif left < LEAST:
            outcome.status = "skipped: no time is left"
        else:
            log = out / f"{step.name.replace(' ', '-')}.log"
            command = [filled(part) for part in step.command]
            outcome.status = run(command, log, left)
            outcome.seconds = round(clock() - start, 1)
        outcomes.append(outcome)
        with (out / "steps.jsonl").open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(f"{outcome.seconds:6.1f} s  {step.name}: {outcome.status}")
    return outcomes


def table(out: Path) -> str:
    """Milliseconds of all rows that were written, in Markdown."""
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for file in sorted(out.glob("*-*.json")):
        for row in json.loads(file.read_text())["rows"]:
            took = row.get("median_ms")
            text = row.get("error") or (f"{took:.2f}" if took else "-")
            place = cells.setdefault((row["model"], row["batch"]), {})
            place[row["executor"]] = text
    names = sorted({name for row in cells.values() for name in row})
    lines = [["model", "batch", *names], ["---"] * (2 + len(names))]
    for (model, batch), row in sorted(cells.items()):
        found = [row.get(name, "-") for name in names]
        lines.append([model, str(batch), *found])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one of the two calls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("call", choices=STEPS)
    parser.add_argument("carry", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    for folder in (options.out, Path(MODELS)):
        folder.mkdir(parents=True, exist_ok=True)
    run_steps(STEPS[options.call], options.carry, options.out)
    (options.out / "table.md").write_text(table(options.out))


if __name__ == "__main__":
    main()
