"""What the benchmarks share: options, turns, processes of their own, rows.

An *executor* is a function of a :class:`Workload` that loads something and
returns a :class:`Prepared`. All executors of a run live in one process and
take turns, round by round, so that a change of the machine's speed hits all
of them. Peak memory and load time come from one process for each executor.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from models import (
    NAMES,
    Recogniser,
    build_modules,
    make_wavs,
    quantize_by_max,
)
from torch import nn

from speechbrain_stablequant.integer import IntegerLayer


@dataclass(frozen=True)
class Options:
    """The options of a run, see :func:`parse`."""

    model: str
    seconds: float
    batch: int
    threads: int
    executors: tuple[str, ...]
    rounds: int
    json: str | None
    bits: int
    device: str
    peak: bool
    child: str | None


class Workload:
    """The model and the input of a run; all of it is made when first used.

    Arguments
    ---------
    options : Options
        The run.
    folder : Path
        Scratch space of this run.
    """

    def __init__(self, options: Options, folder: Path):
        self.options = options
        self.folder = folder

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The float modules, on the device."""
        modules = build_modules(self.options.model)
        return {k: m.to(self.options.device) for k, m in modules.items()}

    @cached_property
    def wavs(self) -> torch.Tensor:
        """float32 [batch, samples], on the device."""
        wavs = make_wavs(self.options.seconds, self.options.batch)
        return wavs.to(self.options.device)

    @cached_property
    def _quantized(self) -> tuple[dict[str, IntegerLayer], torch.Tensor]:
        return quantize_by_max(self.modules, self.wavs, self.options.bits)

    @property
    def integers(self) -> dict[str, IntegerLayer]:
        """Integer layers by name."""
        return self._quantized[0]

    @property
    def logits(self) -> torch.Tensor:
        """Logits of the float model for :attr:`wavs`."""
        return self._quantized[1]

    def recogniser(self) -> Recogniser:
        """The float model as one module; a shallow one, the weights are
        shared between all of them."""
        return Recogniser(self.modules)


@dataclass(frozen=True)
class Prepared:
    """An executor that is ready.

    Arguments
    ---------
    run : callable
        wavs [batch, samples] to logits [batch, frames, labels].
    size_mb : float
        What it takes on disk, in 10^6 bytes.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    size_mb: float


Executor = Callable[[Workload], Prepared]


@dataclass
class Row:
    """One row of the JSON file."""

    executor: str
    model: str
    seconds: float
    batch: int
    median_ms: float = 0.0
    min_ms: float = 0.0
    rtf: float = 0.0
    peak_mb: float | None = None
    load_s: float | None = None
    size_mb: float = 0.0
    cosine: float = 0.0
    times_ms: list[float] = field(default_factory=list)


def parse(
    executors: Mapping[str, Executor],
    default: Sequence[str],
    device: str,
    argv: Sequence[str] | None = None,
) -> Options:
    """Reads the command line.

    Arguments
    ---------
    executors : Mapping
        All that there are, by name.
    default : sequence of str
        Those that run if none are named.
    device : str
        Where they run.
    argv : sequence of str, optional
        Instead of the command line.

    Returns
    -------
    Options
    """
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", default="hubert-large", help=f"{', '.join(NAMES)}, FOLDER"
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument(
        "--executors",
        default=",".join(default),
        help=f"comma-separated, of {', '.join(executors)}",
    )
    parser.add_argument(
        "--no-peak",
        dest="peak",
        action="store_false",
        help="no processes of their own for peak memory and load time",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = vars(parser.parse_args(argv))
    names = tuple(args.pop("executors").split(","))
    for name in names:
        if name not in executors:
            parser.error(f"executor '{name}' is none of {', '.join(executors)}")
    return Options(executors=names, device=device, **args)


def synchronize(device: str) -> None:
    """Waits for a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def time_once(
    run: Callable[[torch.Tensor], torch.Tensor],
    wavs: torch.Tensor,
) -> float:
    """Milliseconds of one call."""
    synchronize(wavs.device)
    start = time.perf_counter()
    run(wavs)
    synchronize(wavs.device)
    return (time.perf_counter() - start) * 1e3


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of two tensors as vectors."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float(
        torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    )


def peak_bytes(device: str) -> int:
    """Largest memory of this process so far, or of the GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def interleave(
    prepared: Mapping[str, Prepared], wavs: torch.Tensor, rounds: int
) -> dict[str, list[float]]:
    """Times executors in turns.

    Arguments
    ---------
    prepared : Mapping
        Executors by name, warmed up.
    wavs : torch.Tensor
        The input.
    rounds : int
        Calls of each.

    Returns
    -------
    dict
        Milliseconds of each call by name.
    """
    times: dict[str, list[float]] = {name: [] for name in prepared}
    names = list(prepared)
    for turn in range(rounds):
        shift = turn % len(names)  # nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            times[name].append(time_once(prepared[name].run, wavs))
    return times


def _child(executor: Executor, workload: Workload) -> dict[str, float]:
    """Peak memory above the imports, and load time, of one executor."""
    before = peak_bytes(workload.options.device)
    wavs = workload.wavs
    start = time.perf_counter()
    prepared = executor(workload)
    prepared.run(wavs)
    load_s = time.perf_counter() - start
    prepared.run(wavs)
    synchronize(wavs.device)
    peak = peak_bytes(workload.options.device) - before
    return {"peak_mb": round(peak / 1e6, 1), "load_s": round(load_s, 2)}


def _in_own_process(name: str, argv: Sequence[str], folder: Path) -> dict:
    command = [sys.executable, *argv, "--executors", name]
    result = subprocess.run(
        [*command, "--child", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(
            f"{name}: its own process failed: {result.stderr.strip()[-400:]}"
        )
    return json.loads(result.stdout.splitlines()[-1])


def machine(device: str) -> dict[str, str]:
    """What the run ran on."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    out = {
        "cpu": name,
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
    }
    if torch.device(device).type == "cuda":
        out["gpu"] = torch.cuda.get_device_name()
    return out


def print_table(rows: Sequence[Row]) -> None:
    """Prints the rows, the fastest first, with ratios to the slowest."""
    slowest = max(row.median_ms for row in rows)
    head = (
        f"{'executor':22} {'median ms':>10} {'min ms':>9} {'ratio':>6} "
        f"{'rtf':>7} {'peak MB':>8} {'load s':>7} {'MB':>7} {'cosine':>8}"
    )
    print(head)
    for row in sorted(rows, key=lambda r: r.median_ms):
        peak = "-" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        load = "-" if row.load_s is None else f"{row.load_s:.1f}"
        print(
            f"{row.executor:22} {row.median_ms:10.1f} {row.min_ms:9.1f} "
            f"{slowest / row.median_ms:6.2f} {row.rtf:7.4f} {peak:>8} "
            f"{load:>7} {row.size_mb:7.0f} {row.cosine:8.5f}"
        )


def main(
    executors: Mapping[str, Executor],
    default: Sequence[str],
    device: str,
    describe: Callable[[], Mapping[str, str]] = dict,
    argv: Sequence[str] | None = None,
) -> list[Row]:
    """Runs a benchmark from the command line.

    Arguments
    ---------
    executors : Mapping
        All that there are, by name.
    default : sequence of str
        Those that run if none are named.
    device : str
        Where they run.
    describe : callable
        More about the machine, for the JSON file.
    argv : sequence of str, optional
        Instead of the command line.

    Returns
    -------
    list of Row
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(executors, default, device, argv)
    torch.set_num_threads(options.threads)
    if options.child is not None:
        workload = Workload(options, Path(options.child))
        with torch.no_grad():
            print(json.dumps(_child(executors[options.executors[0]], workload)))
        return []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = _run(executors, Workload(options, Path(folder)), argv)
    about = {**machine(device), **describe(), "threads": options.threads}
    print(json.dumps(about))
    print_table(rows)
    if options.json:
        content = {"machine": about, "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(content, indent=1))
    return rows


def _run(
    executors: Mapping[str, Executor], workload: Workload, argv: Sequence[str]
) -> list[Row]:
    options = workload.options
    prepared, rows = {}, {}
    for name in options.executors:
        print(f"preparing {name}", file=sys.stderr, flush=True)
        row = Row(name, options.model, options.seconds, options.batch)
        start = time.perf_counter()
        prepared[name] = executors[name](workload)
        out = prepared[name].run(workload.wavs)
        synchronize(options.device)
        row.load_s = round(time.perf_counter() - start, 2)
        for _ in range(2):
            prepared[name].run(workload.wavs)
        row.cosine = cosine(out, workload.logits)
        row.size_mb = round(prepared[name].size_mb, 1)
        rows[name] = row
    times = interleave(prepared, workload.wavs, options.rounds)
    for name, row in rows.items():
        row.times_ms = [round(t, 2) for t in times[name]]
        row.median_ms = round(statistics.median(times[name]), 2)
        row.min_ms = round(min(times[name]), 2)
        seconds = options.seconds * options.batch
        row.rtf = round(row.median_ms / 1e3 / seconds, 5)
        if options.peak:
            script = str(Path(sys.argv[0]).resolve())
            own = _in_own_process(name, [script, *argv], workload.folder)
            row.peak_mb, row.load_s = own["peak_mb"], own["load_s"]
    return list(rows.values())
