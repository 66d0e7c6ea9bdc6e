"""What the benchmarks share: options, turns, processes of their own, rows.

First each executor writes the files that it needs, in a process of its own.
Then all of them are loaded into one process and take turns, round by round,
so that a change of the machine's speed hits all of them. Last, peak memory
and load time of each come from one more process for each. An executor that
fails in one of these steps gets a row with its error, and the others go on.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from models import NAMES
from workload import Call, Executor, Options, Prepared, Workload, time_once

RIVALS = (
    "transformers",
    "openvino",
    "nncf",
    "onnxruntime",
    "torchao",
    "triton",
)
_STEPS = ("make", "peak")
#: Share of ``--minutes`` after which nothing more is loaded.
_LOADING = 0.7


@dataclass
class Row:
    """One row of the JSON file."""

    executor: str
    model: str
    seconds: float
    batch: int
    median_ms: float | None = None
    min_ms: float | None = None
    cpu_ms: float | None = None
    rtf: float | None = None
    peak_mb: float | None = None
    process_mb: float | None = None
    load_s: float | None = None
    size_mb: float | None = None
    cosine: float | None = None
    error: str | None = None
    times_ms: list[float] = field(default_factory=list)

    def fail(self, message: str) -> None:
        """Notes the first error."""
        self.error = self.error or message
        print(f"{self.executor}: {message}", file=sys.stderr, flush=True)


def parse(
    executors: Mapping[str, Executor],
    device: str,
    argv: Sequence[str] | None = None,
) -> Options:
    """Reads the command line of a script with ``executors`` by name."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", default="hubert-large", help=f"{', '.join(NAMES)}, FOLDER"
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, default=8)
    # on a GPU a call takes a millisecond, and its time varies more
    parser.add_argument(
        "--rounds",
        type=int,
        default=30 if torch.device(device).type == "cuda" else 7,
        help="0: no timing",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="what is not loaded in most of this time is left out",
    )
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument(
        "--executors",
        default=",".join(executors),
        help=f"comma-separated, of {', '.join(executors)}",
    )
    parser.add_argument(
        "--folder",
        help="where made files are kept for the next run; by default they "
        "are deleted",
    )
    parser.add_argument(
        "--no-peak",
        dest="peak",
        action="store_false",
        help="no processes of their own for peak memory and load time",
    )
    parser.add_argument("--step", choices=_STEPS, help=argparse.SUPPRESS)
    args = vars(parser.parse_args(argv))
    names = tuple(args.pop("executors").split(","))
    for name in names:
        if name not in executors:
            parser.error(f"executor '{name}' is none of {', '.join(executors)}")
    if args["model"] not in NAMES and not Path(args["model"]).is_dir():
        parser.error(
            f"model '{args['model']}' is none of {', '.join(NAMES)}, and no "
            "folder"
        )
    return Options(executors=names, device=device, **args)


def require_device(script: str, device: str) -> None:
    """Ends the process if a script needs a CUDA device and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        name = Path(script).name
        sys.exit(f"{name}: needs a CUDA device, and torch finds none here")


# -- measuring -------------------------------------------------------------


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
    status = Path("/proc/self/status")
    if status.is_file():
        # ru_maxrss would begin with the memory of the process that forked.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def interleave(
    prepared: Mapping[str, Prepared],
    wavs: torch.Tensor,
    rounds: int,
    fail: Callable[[str, Exception], None],
) -> dict[str, list[Call]]:
    """Times each executor ``rounds`` times, in turns. One that fails is given
    to ``fail`` with its error, and left out from then on."""
    times: dict[str, list[Call]] = {name: [] for name in prepared}
    names = list(prepared)
    for turn in range(rounds):
        shift = turn % len(names)  # nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            if name not in times:
                continue
            try:
                times[name].append(time_once(prepared[name].run, wavs))
            except Exception as error:
                del times[name]
                fail(name, error)
    return times


# -- processes of their own ------------------------------------------------


def _peak(executor: Executor, workload: Workload) -> dict[str, float]:
    """Memory and load time of an executor in this process."""
    device = workload.options.device
    before = peak_bytes(device)
    wavs = workload.wavs
    start = time.perf_counter()
    prepared = executor.load(workload)
    prepared.run(wavs)
    load_s = time.perf_counter() - start
    prepared.run(wavs)
    peak = peak_bytes(device)
    return {
        "peak_mb": round((peak - before) / 1e6, 1),
        "process_mb": round(peak / 1e6, 1),
        "load_s": round(load_s, 2),
    }


def _child(executor: Executor, workload: Workload) -> None:
    """One step of one executor; its result is the last line of the output."""
    try:
        if workload.options.step == "make":
            executor.make(workload)
            result = {}
        else:
            result = _peak(executor, workload)
    except Exception as error:
        result = {"error": first_line(error)}
    print(json.dumps(result))


def _in_own_process(
    row: Row, step: str, command: Sequence[str], folder: Path
) -> dict:
    """Runs a step of an executor; notes its error."""
    print(f"{row.executor}: {step}", file=sys.stderr, flush=True)
    command = [sys.executable, *command, "--executors", row.executor]
    result = subprocess.run(
        [*command, "--folder", str(folder), "--step", step],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [""]
        row.fail(f"{step}: exit code {result.returncode}: {lines[-1][:200]}")
        return {}
    out = json.loads(result.stdout.splitlines()[-1])
    if "error" in out:
        row.fail(f"{step}: {out.pop('error')}")
    return out


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:200]


# -- the table -------------------------------------------------------------


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
    for package in RIVALS:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "not installed"
    if torch.device(device).type == "cuda":
        out["gpu"] = torch.cuda.get_device_name()
    return out


def _line(row: Row, base: float) -> str:
    """A row of the table; speed is relative to ``base`` milliseconds."""
    cells = (
        (row.median_ms, "10.1f"),
        (row.min_ms, "9.1f"),
        (row.cpu_ms, "9.1f"),
        (row.median_ms and base / row.median_ms, "6.2f"),
        (row.rtf, "7.4f"),
        (row.peak_mb, "8.0f"),
        (row.load_s, "7.1f"),
        (row.size_mb, "7.0f"),
        (row.cosine, "8.5f"),
    )
    texts = (
        "-".rjust(int(form.partition(".")[0])) if x is None else format(x, form)
        for x, form in cells
    )
    return f"{row.executor:22} {' '.join(texts)}"


def table(rows: Sequence[Row], about: Mapping[str, object]) -> str:
    """The rows of a run as text, the fastest first; speed is relative to
    ``torch_fp32``, or else to the slowest."""
    timed = [row for row in rows if row.median_ms is not None]
    bases = [r.median_ms for r in timed if r.executor == "torch_fp32"]
    base = max(bases or [r.median_ms for r in timed], default=0.0)
    one = rows[0]
    lines = [
        ", ".join(f"{key}: {value}" for key, value in about.items()),
        f"{one.model}, {one.seconds:g} s, batch {one.batch}",
        f"{'executor':22} {'median ms':>10} {'min ms':>9} {'cpu ms':>9} "
        f"{'speed':>6} {'rtf':>7} {'peak MB':>8} {'load s':>7} {'MB':>7} "
        f"{'cosine':>8}",
    ]
    timed.sort(key=lambda row: row.median_ms)
    lines += [_line(row, base) for row in timed]
    for row in rows:
        if row.median_ms is None and row.peak_mb is not None:
            lines.append(_line(row, base))
        if row.error is not None:
            lines.append(f"{row.executor:22} FAILED: {row.error}")
    return "\n".join(lines)


# -- the run ---------------------------------------------------------------


def main(
    executors: Mapping[str, Executor],
    device: str,
    script: str,
    describe: Callable[[], Mapping[str, str]] = dict,
    argv: Sequence[str] | None = None,
) -> list[Row]:
    """Runs a benchmark from the command line: ``script`` is the file that calls
    this, ``describe`` says more about the machine."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(executors, device, argv)
    require_device(script, device)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.step is not None:
        workload = Workload(options, Path(options.folder))
        with torch.no_grad():
            _child(executors[options.executors[0]], workload)
        return []
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = Path(options.folder or scratch).resolve()
        command = [str(Path(script).resolve()), *argv]
        rows = _run(executors, Workload(options, folder), command, folder)
    about = {**machine(device), **describe(), "threads": options.threads}
    print(table(rows, about))
    if options.json:
        content = {"machine": about, "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(content, indent=1))
    return rows


def _load(executor: Executor, row: Row, workload: Workload) -> Prepared | None:
    """Gets an executor ready and warm; notes its error."""
    print(f"{row.executor}: load", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        prepared = executor.load(workload)
        out = prepared.run(workload.wavs)
        row.load_s = round(time.perf_counter() - start, 2)
        for _ in range(2):
            prepared.run(workload.wavs)
    except Exception as error:
        row.fail(first_line(error))
        return None
    if workload.logits is not None:
        row.cosine = round(cosine(out, workload.logits), 6)
    row.size_mb = round(prepared.size_mb, 3)
    return prepared


def _run(
    executors: Mapping[str, Executor],
    workload: Workload,
    command: Sequence[str],
    folder: Path,
) -> list[Row]:
    options = workload.options
    workload.make()
    rows = {
        name: Row(name, options.model, options.seconds, options.batch)
        for name in options.executors
    }
    for name, row in rows.items():
        if not executors[name].is_made(workload):
            _in_own_process(row, "make", command, folder)
    if options.rounds:
        _time(executors, rows, workload)
    for row in rows.values():
        if options.peak and row.error is None:
            for key, value in _in_own_process(
                row, "peak", command, folder
            ).items():
                setattr(row, key, value)
    return list(rows.values())


def _time(
    executors: Mapping[str, Executor],
    rows: Mapping[str, Row],
    workload: Workload,
) -> None:
    """Fills in the times of the rows without an error."""
    options = workload.options
    begin, prepared = time.monotonic(), {}
    for name, row in rows.items():
        spent = (time.monotonic() - begin) / 60
        if options.minutes is not None and spent > _LOADING * options.minutes:
            row.fail(f"no time left of {options.minutes:.2g} minutes")
        if row.error is None:
            ready = _load(executors[name], row, workload)
            if ready is not None:
                prepared[name] = ready
    print("timing", file=sys.stderr, flush=True)

    def fail(name: str, error: Exception) -> None:
        rows[name].fail(first_line(error))
        del prepared[name]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    times = interleave(prepared, workload.wavs, options.rounds, fail)
    for name, calls in times.items():
        row = rows[name]
        values = [call.ms for call in calls]
        row.times_ms = [round(t, 3) for t in values]
        row.median_ms = round(statistics.median(values), 3)
        row.min_ms = round(min(values), 3)
        row.cpu_ms = round(statistics.median(c.cpu_ms for c in calls), 3)
        seconds = options.seconds * options.batch
        row.rtf = round(row.median_ms / 1e3 / seconds, 6)
