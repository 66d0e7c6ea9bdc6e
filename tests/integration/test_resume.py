"""A search that is killed at any moment goes on where it was."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from trained_recipe import BLOCK, ONE_SET

from speechbrain_stablequant.utils.store import Store

SCRIPT = Path(__file__).resolve().parent / "slow_recipe.py"
PAUSE = "0.01"
EIGHT_BITS = """
quantize: !apply:speechbrain_stablequant.register
    target: [wav2vec2, enc, ctc_lin]
    method: max
    calibration: {num_utterances: 4}
    backend: torch_int8
"""


def start(trained, output: Path):
    """Starts the slow recipe."""
    arguments = trained.test_arguments(output, *ONE_SET, block=BLOCK)
    return trained.starter.start(
        SCRIPT, *arguments, cwd=output.parent, SECONDS_A_BATCH=PAUSE
    )


def journal(output: Path) -> bytes:
    """What the search has written so far."""
    path = output / "quantized" / "search.jsonl"
    return path.read_bytes() if path.exists() else b""


def alive(pid: int) -> bool:
    """Whether a process runs; one that was not waited for yet does not."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return stat.rpartition(")")[2].split()[0] != "Z"


def kill_when(process, condition, seconds: float) -> bool:
    """Kills a process a moment after a condition holds.

    Arguments
    ---------
    process : Process
        What to kill.
    condition : callable
        Of nothing.
    seconds : float
        How long to wait after it holds.

    Returns
    -------
    bool
        Whether the process was killed; it may have ended before.
    """
    deadline = time.monotonic() + 60
    while not condition():
        if not alive(process.pid):
            break
        assert time.monotonic() < deadline, "the search does not go on"
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    return process.wait().code == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(trained):
    """The output folder of a run that nobody killed."""
    output = trained.root / "undisturbed"
    finished = start(trained, output).wait()
    assert finished.code == 0, finished.out + finished.err
    return output


@pytest.mark.slow
def test_killed_search_goes_on(trained, undisturbed, tmp_path):
    output = tmp_path / "killed"
    draw = random.Random(20250406)
    expected = journal(undisturbed).splitlines()
    known, kills = b"", 0
    while True:
        process = start(trained, output)
        # So many finished evaluations more, and a part of the next one.
        lines = known.count(b"\n") + draw.randint(1, 5)
        killed = kill_when(
            process,
            lambda lines=lines: journal(output).count(b"\n") >= lines,
            draw.uniform(0, 0.08),
        )
        if not killed:
            break
        kills += 1
        text = journal(output)
        assert text.startswith(known)
        known = text[: text.rfind(b"\n") + 1]
        if known.count(b"\n") >= len(expected):
            break
    assert kills >= 5
    finished = start(trained, output).wait()
    assert finished.code == 0, finished.out + finished.err
    assert journal(output).startswith(known)
    folder, other = output / "quantized", undisturbed / "quantized"
    assert (folder / "plan.json").read_bytes() == (
        other / "plan.json"
    ).read_bytes()
    # No evaluation was done twice, none was left out.
    rows = [json.loads(line) for line in journal(output).splitlines()]
    assert rows == [json.loads(line) for line in expected]
    assert (folder / "wer_clean.txt").read_bytes() == (
        other / "wer_clean.txt"
    ).read_bytes()


def test_half_a_line_is_measured_again(trained, undisturbed, tmp_path):
    output = tmp_path / "torn"
    process = start(trained, output)
    assert kill_when(process, lambda: journal(output).count(b"\n") > 4, 0)
    lines = journal(output).splitlines(keepends=True)[:5]
    torn = b"".join(lines[:4]) + lines[4][: len(lines[4]) // 2]
    path = output / "quantized" / "search.jsonl"
    path.write_bytes(torn)
    finished = start(trained, output).wait()
    assert finished.code == 0, finished.out + finished.err
    assert journal(output) == journal(undisturbed)
    assert (output / "quantized/plan.json").read_bytes() == (
        undisturbed / "quantized/plan.json"
    ).read_bytes()


@pytest.fixture(scope="module")
def evaluated(trained):
    """A finished run."""
    output = trained.root / "evaluated"
    finished = trained.run(output, *ONE_SET, block=EIGHT_BITS)
    assert finished.code == 0, finished.out + finished.err
    return output


@pytest.mark.parametrize(
    "change, again",
    [
        ((), False),
        (("--quantize", "{backend_options: {threads: 1}}"), True),
        (("--eval_precision", "bf16"), True),
    ],
)
def test_what_was_evaluated_otherwise_is_evaluated_again(
    trained, evaluated, tmp_path, change, again
):
    """Transcripts and times of another setting are not those of this one."""
    output = tmp_path / "output"
    shutil.copytree(evaluated, output)
    path = output / "quantized" / "transcripts_clean.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    changed = {**kept["content"], "audio": "marked"}
    Store(path.parent).write(path.name, kept["key"], changed)
    finished = trained.run(output, *ONE_SET, *change, block=EIGHT_BITS)
    assert finished.code == 0, finished.out + finished.err
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["content"]["audio"] != "marked") is again
    assert (found["key"] != kept["key"]) is again
    report = output / "quantized" / "report.json"
    said = json.loads(report.read_text("utf-8"))["environment"]
    reduced = "autocast to bfloat16" if "bf16" in change else "float32"
    assert said["float arithmetic"] == reduced


def test_other_settings_do_not_use_the_journal(trained, undisturbed, tmp_path):
    # The journal of a search over six utterances, one over five.
    output = tmp_path / "other"
    (output / "quantized").mkdir(parents=True)
    path = output / "quantized" / "search.jsonl"
    path.write_bytes(journal(undisturbed))
    change = ("--quantize", "{search: {num_utterances: 5}}")
    finished = trained.run(output, *change, *ONE_SET)
    assert finished.code == 0, finished.out + finished.err
    text = path.read_bytes()
    assert text.startswith(journal(undisturbed))
    added = text[len(journal(undisturbed)) :].splitlines()
    # It measured the float model and each unit for itself.
    labels = [json.loads(line)["label"] for line in added]
    assert labels[0] == "float"
    plan = json.loads((output / "quantized/plan.json").read_text("utf-8"))
    assert len(labels) >= 1 + len(plan["units"])
