"""The steps of ``tests/benchmarks/device.sh``, rehearsed without a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import device
import operators
import pytest
import torch
from quantized_folder import write

HERE = Path(device.__file__).parent


class Clock:
    """A clock that steps move on."""

    now = 100.0

    def __call__(self):
        return self.now


def rehearse(call, carry, out, spent, failing=()):
    """Outcomes of a call whose steps take so many seconds each."""
    clock, commands = Clock(), []

    def run(command, log, limit):
        commands.append(command)
        clock.now += min(spent, limit)
        late = f"stopped after {limit:.0f} s"
        if log.stem in failing:
            return "status 1: broken"
        return late if spent > limit else "done"

    found = device.run_steps(device.STEPS[call], carry, out, run, clock)
    assert clock.now - 100 <= device.BUDGET + 1e-6
    return {outcome.name: outcome.status for outcome in found}, commands


@pytest.mark.parametrize("call", device.STEPS)
def test_every_step_is_begun_and_written_at_once(call, tmp_path):
    for name in ("folder", "test"):
        (tmp_path / name).mkdir()
    found, commands = rehearse(call, tmp_path, tmp_path, 5.0)
    assert set(found.values()) == {"done"}
    assert len(commands) == len(found) == len(device.STEPS[call])
    for command in commands:
        assert not any("{" in part for part in command)
        for part in command:
            if part.endswith(".py"):
                assert Path(part).is_file()
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == list(found)


def test_what_is_missing_late_or_broken_takes_nothing_from_the_others(tmp_path):
    found, _ = rehearse("first", tmp_path, tmp_path, 100.0, ("kernels",))
    assert found["kernels"] == "status 1: broken"
    assert found["every tile"].endswith("folder is not there")
    assert found["hubert-large-8-ours"] == "stopped after 80 s"
    assert found["hubert-large-1-ours"] == "stopped after 30 s"
    assert found["wav2vec2-base-32-ours"] == "skipped: no time is left"


def test_a_process_that_is_late_is_stopped(tmp_path):
    log = tmp_path / "log"
    wait = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert device.execute(wait, log, 0.5) == "stopped after 0 s"
    broken = [sys.executable, "-c", "raise SystemExit('no such card')"]
    assert device.execute(broken, log, 60) == "status 1: no such card"


def test_one_table_of_all_rows(tmp_path):
    row = {"model": "m", "batch": 8, "executor": "ours_triton"}
    other = {**row, "executor": "tensorrt_int8", "error": "not installed"}
    rows = [{**row, "median_ms": 1.234, "error": None}, other]
    (tmp_path / "m-8-ours.json").write_text(json.dumps({"rows": rows}))
    assert device.table(tmp_path).splitlines() == [
        "| model | batch | ours_triton | tensorrt_int8 |",
        "| --- | --- | --- | --- |",
        "| m | 8 | 1.23 | not installed |",
    ]


def test_a_ceiling_that_was_not_measured(monkeypatch):
    times = iter([0.0, float("inf"), 2.0, 0.0])
    monkeypatch.setattr(operators, "time_us", lambda *_: next(times))
    assert operators._best(4e6, [None, None, None], 1) == 2.0
    assert operators._best(4e6, [None], 1) is None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_probe_on_tiles_in_the_interpreter(make_tiny_modules, tmp_path):
    """As the first call does it, with two tiles."""
    folder = tmp_path / "model"
    write(folder, make_tiny_modules("hubert-large"))
    done = subprocess.run(
        [
            *(sys.executable, str(HERE / "every_tile.py")),
            *(str(folder), "--device", "cpu", "--rounds", "2"),
            *("--dtype", "float16"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows == [{"round": n, "failure": None} for n in (0, 1)]
