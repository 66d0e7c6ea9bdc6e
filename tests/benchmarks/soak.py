"""What a service does to a recognizer: many threads, forked processes, a
thousand lengths, the same audio again and again.

Each check of each runtime is a process of its own with a time limit, so that
memory is that of the check alone, and a check that hangs is counted. A row
says ``ok``, ``FAILED``, or nothing where it is a figure without a limit. The
exit status is 1 if a check failed.

Example
-------
python tests/benchmarks/soak.py results/quant/1986/quantized
python tests/benchmarks/soak.py results/quant/1986/quantized \
    --runtimes openvino --checks threads fork --calls 100
"""

import argparse
import json
import logging
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import soundfile
import torch
from speechbrain.decoders import ctc_greedy_decode
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from wer import SAMPLE_RATE, utterances

from speechbrain_stablequant import Recognizer, load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
tests = ROOT / "tests"
sys.path[:0] = [str(tests), str(tests / "integration")]

from forks import fork, wait  # noqa: E402

DEMO = ROOT / "recipes/LibriSpeech/ASR/CTC/demo/LibriSpeech/test-demo"
RUNTIMES = ("torch", "torch_int8", "openvino", "onnx")
#: Recognizers whose first calls come together, for each number of threads.
COLD = 5
#: Times that the same audio comes.
REPEATS = 10
#: Lengths before the memory that later ones are compared with.
FIRST = 100
#: Bytes that memory may grow by after these, in 10^6.
GROWTH_MB = 100
#: Seconds in which a child that cannot compute must say so.
PROMPT = 1.0
CALLERS = 4
#: Beginning of the lines by which a check gives its rows.
MARK = "row "

Row = dict[str, Any]
Checks = Iterator[Row]


@dataclass(frozen=True)
class Answer:
    """What a recognizer makes of audio."""

    text: str
    log_probs: torch.Tensor

    def same(self, other: "Answer") -> bool:
        """Whether another is equal to the last bit."""
        return torch.equal(self.log_probs, other.log_probs)


# -- audio and recognizers ----------------------------------------------------


def waves_of(split: Path) -> list[torch.Tensor]:
    """The utterances of a split, the longest first; float32 [samples]."""
    return [
        torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        for path, _ in utterances(split)
    ]


def excerpts(split: Path, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """Speech of some lengths in samples, each from another place."""
    speech = torch.cat(waves_of(split))
    draw = random.Random(2)
    for length in lengths:
        start = draw.randrange(max(len(speech) - length, 0) + 1)
        yield speech[start : start + length]


def spread(low: float, high: float, count: int) -> list[int]:
    """Different lengths in samples from so many seconds to so many."""
    found = torch.linspace(low * SAMPLE_RATE, high * SAMPLE_RATE, count)
    return found.round().int().tolist()


def pieces(args: argparse.Namespace) -> list[torch.Tensor]:
    """Speech of 20 lengths, as a service gets it."""
    return list(excerpts(args.split, spread(1.0, 6.0, 20)))


def recognizer(args: argparse.Namespace, **options: Any) -> Recognizer:
    """One that has not computed yet."""
    return load(args.folder, args.runtime, backend_options=options)


def encoder_of(asr: Recognizer) -> torch.nn.Module:
    """The encoder that computes, once there was a call."""
    return asr.model.parts[asr.spec.encoder.key]


def answer(asr: Recognizer, wave: torch.Tensor) -> Answer:
    """Transcript and log probabilities of audio."""
    whole = torch.ones(1)
    found = asr.encode_batch(wave[None], whole)
    (tokens,) = ctc_greedy_decode(found, whole, blank_id=asr.spec.blank_index)
    return Answer(asr.text(tokens), found)


def answers(
    asr: Recognizer, waves: Sequence[torch.Tensor], what: str = "alone"
) -> list[Answer]:
    """What one thread gets."""
    bar = tqdm(waves, what, dynamic_ncols=True, leave=False)
    return [answer(asr, wave) for wave in bar]


def resident_mb() -> float:
    """Memory of this process, in 10^6 bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6


# -- threads ------------------------------------------------------------------


@dataclass
class Tally:
    """What threads got."""

    calls: int = 0
    wrong_texts: int = 0
    wrong_bits: int = 0
    errors: int = 0
    error: str = ""

    def row(self, case: str) -> Row:
        """Of the table."""
        failed = self.wrong_texts or self.wrong_bits or self.errors
        row = {"case": case, **vars(self), "passed": not failed}
        if not self.errors:
            del row["error"]
        return row


def together(
    pairs: Sequence[tuple[Recognizer, Sequence[Answer]]],
    waves: Sequence[torch.Tensor],
    threads: int,
    calls: int,
    tally: Tally,
    bar: tqdm,
) -> None:
    """``calls`` of each of some threads that begin at once, each with an order
    of its own. ``pairs``: recognizers, which take turns in each thread, and
    what they answer when they are alone. Counts in ``tally``, moves ``bar``."""
    start, lock = threading.Barrier(threads), threading.Lock()

    def work(number: int) -> None:
        draw = random.Random(number)
        start.wait()
        for place in range(calls):
            asr, expected = pairs[(number + place) % len(pairs)]
            i = draw.randrange(len(waves))
            try:
                got, error = answer(asr, waves[i]), ""
            except Exception as raised:
                got, error = None, f"{type(raised).__name__}: {raised}"
            with lock:
                tally.calls += 1
                bar.update()
                if got is None:
                    tally.errors += 1
                    tally.error = tally.error or error
                    continue
                tally.wrong_texts += got.text != expected[i].text
                tally.wrong_bits += not got.same(expected[i])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def check_threads(args: argparse.Namespace) -> Checks:
    """First calls that come together, and later ones."""
    waves = pieces(args)
    warm = recognizer(args)
    expected = answers(warm, waves)
    for threads in args.threads:
        each = -(-args.calls // threads)
        for state, turns in (("cold", COLD), ("warm", 1)):
            tally, case = Tally(), f"{threads} threads, {state}"
            calls = -(-each // turns)
            with tqdm(desc=case, total=threads * calls * turns) as bar:
                for _ in range(turns):
                    asr = warm if state == "warm" else recognizer(args)
                    pair = [(asr, expected)]
                    together(pair, waves, threads, calls, tally, bar)
            yield tally.row(case)


def check_two(args: argparse.Namespace) -> Checks:
    """Two new recognizers in one process, which threads use in turns: of two
    folders, or of two runtimes."""
    waves = pieces(args)
    runtime, folder = args.runtime, args.other
    if folder is None:
        folder = args.folder
        runtime = RUNTIMES[RUNTIMES.index(runtime) - 1]

    def both() -> list[Recognizer]:
        return [recognizer(args), load(folder, runtime)]

    expected = [answers(asr, waves) for asr in both()]
    for threads in args.threads:
        tally, each = Tally(), -(-args.calls // threads)
        pairs = list(zip(both(), expected, strict=True))
        case = f"{threads} threads, beside {folder.name} on {runtime}"
        with tqdm(desc=case, total=threads * each) as bar:
            together(pairs, waves, threads, each, tally, bar)
        yield tally.row(case)


# -- forked processes ---------------------------------------------------------


def child_says(asr: Recognizer, waves: Sequence[torch.Tensor]) -> Row:
    """Transcripts, or an error and the seconds until it came."""
    began = time.perf_counter()
    try:
        return {"texts": [answer(asr, wave).text for wave in waves]}
    except Exception as error:
        seconds = time.perf_counter() - began
        return {"error": str(error), "seconds": seconds}


def check_fork(args: argparse.Namespace) -> Checks:
    """Children of a process that has not used its recognizer, and of one that
    has. The process itself has computed with several threads of torch."""
    waves = pieces(args)[::3]
    torch.set_num_threads(max(torch.get_num_threads(), 4))
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    asr = recognizer(args)
    said = {}
    for state in ("unused", "used"):
        if state == "used":
            expected = [answer(asr, wave).text for wave in waves]
        children = [
            fork(lambda: child_says(asr, waves)) for _ in range(args.children)
        ]
        deadline = time.monotonic() + args.patience
        said[state] = [wait(*child, deadline) for child in children]
    for state, rows in said.items():
        told = [row for row in rows if isinstance(row, dict)]
        row = {
            "case": f"{state} parent",
            "right": sum(row.get("texts") == expected for row in told),
            "lines": sum(is_prompt_line(row) for row in told),
            "hangs": rows.count("hangs"),
            "died": rows.count("died"),
        }
        errors = [row for row in told if "error" in row]
        if errors:
            row["seconds"] = round(max(x["seconds"] for x in errors), 3)
            row["error"] = errors[0]["error"]
        good = row["right"] + (row["lines"] if state == "used" else 0)
        yield {**row, "passed": good == args.children}


def is_prompt_line(said: Row) -> bool:
    """Whether a child said in one line, and soon, that it cannot compute."""
    error = said.get("error")
    if error is None or "\n" in error:
        return False
    return "after the fork" in error and said["seconds"] <= PROMPT


# -- the same audio again -----------------------------------------------------


def check_repeat(args: argparse.Namespace) -> Checks:
    """The same audio in shuffled order among other audio, and in a row: the
    encoder's output and the log probabilities are equal to the last bit."""
    waves = pieces(args)
    asr = recognizer(args)
    answer(asr, waves[0])  # the encoder is replaced by the first call
    encoded: list[torch.Tensor] = []
    encoder_of(asr).register_forward_hook(
        lambda *call: encoded.append(call[-1])
    )

    def outputs(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = answer(asr, waves[i]).log_probs
        return encoded.pop(), found

    first = [outputs(i) for i in range(len(waves))]
    places = list(range(len(waves)))
    shuffled = places * REPEATS
    random.Random(0).shuffle(shuffled)
    in_a_row = [i for i in places for _ in range(REPEATS)]
    orders = {"shuffled": shuffled, "in a row": in_a_row}
    for case, order in orders.items():
        changed = [0, 0]
        for i in tqdm(order, f"repeat, {case}", dynamic_ncols=True):
            for place, pair in enumerate(
                zip(first[i], outputs(i), strict=True)
            ):
                changed[place] += not torch.equal(*pair)
        yield {
            "case": case,
            "calls": len(order),
            "other_encodings": changed[0],
            "other_log_probs": changed[1],
            "passed": not any(changed),
        }


# -- lengths ------------------------------------------------------------------


def check_lengths(args: argparse.Namespace) -> Checks:
    """Memory over inputs that are all of different lengths."""
    lengths = spread(*args.seconds, args.lengths)
    random.Random(0).shuffle(lengths)
    asr = recognizer(args)
    waves = tqdm(
        excerpts(args.split, lengths), "lengths", len(lengths), leave=False
    )
    count = len(lengths)
    marks = (1, min(FIRST, count), max(count // 2, 1), count)
    at, times = {}, []
    for done, wave in enumerate(waves, 1):
        began = time.perf_counter()
        asr.encode_batch(wave[None], torch.ones(1))
        times.append(time.perf_counter() - began)
        if done in marks:
            at[done] = resident_mb()
    once, first, half, last = (at[i] for i in marks)
    yield {
        "case": f"{len(set(lengths))} lengths",
        "mb_after_1": round(once),
        f"mb_after_{marks[1]}": round(first),
        "mb_halfway": round(half),
        "mb_at_end": round(last),
        "growth_mb": round(last - first, 1),
        "ms": round(1e3 * statistics.median(times), 1),
        "passed": last - first < GROWTH_MB,
    }


# -- throughput ---------------------------------------------------------------


def check_throughput(args: argparse.Namespace) -> Checks:
    """Callers side by side, each computed by one thread, against one caller
    that makes as many calls; in turns."""
    torch.set_num_threads(1)
    options = {} if args.runtime == "torch" else {"threads": 1}
    asr = recognizer(args, **options)
    (wave,) = excerpts(args.split, [round(5.0 * SAMPLE_RATE)])

    def calls(_: int) -> None:
        for _ in range(5):
            asr.encode_batch(wave[None], torch.ones(1))

    def seconds(callers: int) -> tuple[float, float]:
        """By the clock, and of all cores."""
        began, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(callers) as pool:
            list(pool.map(calls, range(CALLERS)))
        return time.perf_counter() - began, time.process_time() - cpu

    seconds(1)
    before = resident_mb()
    seconds(CALLERS)
    more = resident_mb() - before
    ratios, alone, cores = [], [], []
    for _ in tqdm(range(args.rounds), "throughput", dynamic_ncols=True):
        one, one_cpu = seconds(1)
        four, four_cpu = seconds(CALLERS)
        alone.append(one)
        ratios.append(one / four)
        cores.append((one_cpu / one, four_cpu / four))
    ratio = statistics.median(ratios)
    one_cores, four_cores = map(statistics.median, zip(*cores, strict=True))
    yield {
        "case": f"{CALLERS} callers",
        "times_one": round(ratio, 2),
        "best": round(max(ratios), 2),
        # Far from 1 and all: others use this machine.
        "cores_one": round(one_cores, 2),
        "cores_all": round(four_cores, 2),
        "ms_alone": round(1e3 * statistics.median(alone) / (5 * CALLERS), 1),
        "mb_a_caller": round(more / (CALLERS - 1), 1),
        "passed": None if args.gain is None else ratio >= args.gain,
    }


# -- padding ------------------------------------------------------------------


@contextmanager
def no_buckets() -> Iterator[None]:
    """The openvino runtime computes each length as it is."""
    from speechbrain_stablequant.runtimes.openvino_ import executor

    with mock.patch.object(
        executor, "round_frames", lambda frames, *steps: frames
    ):
        yield


def check_padding(args: argparse.Namespace) -> Checks:
    """Whole utterances padded to a length that is computed, and within a
    batch. What the wrapper normalizes over padding it does so in the float
    model too: audio is normalized before, and its output is not."""
    asr = recognizer(args)
    waves = [
        torch.nn.functional.layer_norm(wave, wave.shape)
        for wave in waves_of(args.split)[: args.utterances]
    ]
    answer(asr, waves[-1])  # the encoder is replaced by the first call
    encoder = encoder_of(asr)
    encoder.normalize_wav = encoder.output_norm = False
    expected = [x.text for x in answers(asr, waves, "padding, alone")]
    if args.runtime == "openvino":
        with no_buckets():
            exact = [x.text for x in answers(asr, waves, "padding, none")]
        changed = different(expected, exact)
        yield {
            "case": "to a bucket",
            "utterances": len(waves),
            "other_texts": changed,
            "passed": not changed,
        }
    if not asr.spec.encoder.use_lengths:
        return  # the recipe tells no encoder what is padding
    order = list(range(len(waves)))
    random.Random(0).shuffle(order)
    padded = [""] * len(waves)
    starts = range(0, len(order), args.batch)
    for start in tqdm(starts, "padding, batches", dynamic_ncols=True):
        part = order[start : start + args.batch]
        lengths = torch.tensor([len(waves[i]) for i in part])
        batch = pad_sequence([waves[i] for i in part], batch_first=True)
        texts, _ = asr.transcribe_batch(batch, lengths / lengths.max())
        for i, text in zip(part, texts, strict=True):
            padded[i] = text
    changed = different(expected, padded)
    yield {
        "case": f"in batches of {args.batch}",
        "utterances": len(waves),
        "other_texts": changed,
        "passed": not changed,
    }


def different(some: Sequence[str], others: Sequence[str]) -> int:
    """How many texts are not the same."""
    return sum(a != b for a, b in zip(some, others, strict=True))


CHECKS: dict[str, Callable[[argparse.Namespace], Checks]] = {
    "threads": check_threads,
    "two": check_two,
    "fork": check_fork,
    "repeat": check_repeat,
    "lengths": check_lengths,
    "throughput": check_throughput,
    "padding": check_padding,
}


# -- the command --------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="that a run has written")
    add("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    add("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    add("--split", type=Path, default=DEMO, help="speech, LibriSpeech's layout")
    add("--other", type=Path, help="a second folder, for the check of two")
    add("--threads", nargs="+", type=int, default=[4, 16])
    add("--calls", type=int, default=500, help="of all threads together")
    add("--children", type=int, default=6, help="forked from each parent")
    add("--patience", type=float, default=120, help="seconds for children")
    add("--lengths", type=int, default=1000, help="different ones")
    add("--seconds", nargs=2, type=float, default=[1.0, 20.0])
    add("--rounds", type=int, default=5, help="of timing")
    add("--gain", type=float, help="least throughput of four callers")
    add("--utterances", type=int, default=80, help="that are padded")
    add("--batch", type=int, default=4, help="utterances in a batch")
    add("--limit", type=float, default=3600, help="seconds for a check")
    add("--json", type=Path, help="file for the rows")
    add("--check", choices=CHECKS, help=argparse.SUPPRESS)
    add("--runtime", choices=RUNTIMES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def in_own_process(
    argv: Sequence[str], runtime: str, check: str, limit: float
) -> list[Row]:
    """The rows of a check of a runtime, one more if it did not end well."""
    command = [sys.executable, "-W", "ignore::UserWarning", __file__, *argv]
    end: Row | None = None
    try:
        done = subprocess.run(
            [*command, "--runtime", runtime, "--check", check],
            stdout=subprocess.PIPE,
            timeout=limit,
            check=False,
        )
        out = done.stdout
        if done.returncode:
            end = {"case": f"ended with {done.returncode}", "passed": False}
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        end = {"case": f"hangs: not done in {limit:g} s", "passed": False}
    lines = out.decode(errors="replace").splitlines()
    rows = [json.loads(x[len(MARK) :]) for x in lines if x.startswith(MARK)]
    return rows if end is None else [*rows, end]


def line_of(row: Row) -> str:
    """A row of the table."""
    row = dict(row)
    verdict = {True: "ok", False: "FAILED", None: ""}[row.pop("passed")]
    head = [row.pop(key) for key in ("runtime", "check", "case")]
    figures = ", ".join(f"{key} {value}" for key, value in row.items())
    return "{:11}{:11}{:30} {:7}".format(*head, verdict) + figures


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the checks, prints a line for each case and returns the rows."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    if args.check:
        logging.getLogger("speechbrain_stablequant").setLevel(logging.ERROR)
        for row in CHECKS[args.check](args):
            print(MARK + json.dumps(row), flush=True)
        return []
    rows = []
    for runtime in args.runtimes:
        for check in args.checks:
            for row in in_own_process(argv, runtime, check, args.limit):
                row = {"runtime": runtime, "check": check, **row}
                rows.append(row)
                print(line_of(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


if __name__ == "__main__":
    sys.exit(any(row["passed"] is False for row in main()))
