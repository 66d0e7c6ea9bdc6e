"""Kills a run at random times until it has finished, and compares the files.

A run that nobody disturbs comes first. Then chains of runs in one folder each
are killed (SIGKILL) until one finishes: its plan and its model must be those
of the undisturbed run, byte for byte, and no temporary file may be left.

Example
-------
python tests/benchmarks/kills.py shared/models/wav2vec2 \
    --split shared/data/LibriSpeech/mini-dev --method stablequant_plus \
    --utterances 6 --kills 60
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from starter import Process, Starter  # noqa: E402

RECIPE = ROOT / "recipes" / "LibriSpeech" / "ASR" / "CTC"
#: Compared byte by byte.
FILES = ("plan.json", "plan.safetensors", "model/model.safetensors")


def make_corpus(split: Path, folder: Path, count: int) -> None:
    """Two splits of the shortest utterances, in LibriSpeech's layout: ``count``
    in ``dev``, two of them in ``test``."""
    rows = []
    for file in sorted(split.rglob("*.trans.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            audio = file.with_name(f"{line.split(' ')[0]}.flac")
            rows.append((audio.stat().st_size, file.parent, line))
    rows = [row[1:] for row in sorted(rows)]
    for name, part in (("dev", rows[:count]), ("test", rows[:2])):
        for source, line in part:
            speaker, chapter, _ = line.split(" ")[0].split("-")
            place = folder / name / speaker / chapter
            place.mkdir(parents=True, exist_ok=True)
            audio = f"{line.split(' ')[0]}.flac"
            shutil.copy(source / audio, place / audio)
            text = place / f"{speaker}-{chapter}.trans.txt"
            with open(text, "a", encoding="utf-8") as out:
                out.write(line + "\n")


def arguments(args: argparse.Namespace, output: Path) -> list[str]:
    """The command line of a run."""
    block = {"method": args.method, "seed": 1986}
    if args.bits:
        block |= {"weight_bits": args.bits, "activation_bits": args.bits}
    block |= json.loads(args.block)
    return [
        str(RECIPE / "train.py"),
        str(RECIPE / "hparams" / "quant.yaml"),
        *("--data_folder", str(args.folder / "corpus")),
        *("--wav2vec2_hub", str(args.model.resolve())),
        *("--dev_splits", "[dev]", "--test_splits", "[test]"),
        *("--output_folder", str(output)),
        *("--quantize", json.dumps(block)),
        *("--device", "cpu"),
    ]


def start(args: argparse.Namespace, starter: Starter, output: Path) -> Process:
    """Starts a run."""
    return starter.start(
        *arguments(args, output),
        cwd=RECIPE,
        OMP_NUM_THREADS=str(args.threads),
    )


def is_over(process: Process) -> bool:
    """Whether a process has ended; it was not waited for."""
    stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
    return stat.rpartition(")")[2].split()[0] == "Z"


def killed_after(process: Process, seconds: float) -> bool:
    """Kills a process after some seconds; whether it was still running."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_over(process):
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    finished = process.wait()
    if finished.code not in (0, -signal.SIGKILL):
        sys.exit(f"a run failed:\n{finished.out}\n{finished.err}")
    return finished.code != 0


def compare(folder: Path, expected: Path) -> list[str]:
    """Files that differ from the undisturbed run, and temporary ones."""
    wrong = []
    for name in FILES:
        both = [x / "quantized" / name for x in (folder, expected)]
        one, other = (x.read_bytes() if x.exists() else None for x in both)
        if one != other:
            wrong.append(name)
    left = [str(path) for path in folder.rglob(".*.tmp")]
    return wrong + left


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("results/kills"))
    parser.add_argument("--method", default="stablequant_plus")
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--block", default="{}", help="more keys, as JSON")
    parser.add_argument("--utterances", type=int, default=6)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--each", type=float, default=8, help="kills a chain")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    make_corpus(args.split, args.folder / "corpus", args.utterances)
    starter = Starter(args.folder)
    draw = random.Random(args.seed)
    expected = args.folder / "undisturbed"
    began = time.monotonic()
    finished = start(args, starter, expected).wait()
    if finished.code:
        sys.exit(f"the undisturbed run failed:\n{finished.err}")
    whole = time.monotonic() - began
    print(f"undisturbed: {whole:.0f} s", flush=True)
    kills, chain, bad = 0, 0, 0
    while kills < args.kills:
        chain += 1
        output, here = args.folder / f"chain{chain}", 0
        # Every run repeats what comes before its first measurement.
        while killed_after(
            start(args, starter, output),
            draw.uniform(0.02, 2.0) * whole / args.each,
        ):
            here += 1
        kills += here
        wrong = compare(output, expected)
        bad += bool(wrong)
        print(
            f"chain {chain}: {here} kills, "
            + (f"differs: {', '.join(wrong)}" if wrong else "same files"),
            flush=True,
        )
        if not wrong:
            shutil.rmtree(output)
    starter.close()
    print(f"{kills} kills in {chain} chains, {bad} of them with other files")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
