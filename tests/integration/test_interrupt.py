"""Ctrl-C in the middle of a search: one line, and the next run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from starter import environment
from trained_recipe import ATTACHED, BLOCK, ONE_SET

from speechbrain_stablequant.cli.recipe import ending_while_importing
from speechbrain_stablequant.utils.interrupts import Interrupted, explained

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "slow_recipe.py"


def lines(output: Path) -> list[bytes]:
    """What the search has finished."""
    path = output / "quantized" / "search.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


def wait_for_search(output: Path, count: int = 3) -> None:
    """Waits until so many evaluations are finished."""
    deadline = time.monotonic() + 120
    while len(lines(output)) < count:
        assert time.monotonic() < deadline, "the search does not go on"
        time.sleep(0.005)


def check_line(text: str, output: Path) -> None:
    """One line says how to go on, and nothing else is an error."""
    said = [line for line in text.splitlines() if "interrupted;" in line]
    folder = output / "quantized"
    assert said == [
        "quantize: interrupted; start the same command again; it goes on from "
        f"what {folder} holds"
    ]
    assert "Traceback" not in text
    assert not list(folder.glob(".*"))


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_run_by_yaml(trained, tmp_path):
    """In a process of its own and to all of its group, as a terminal does."""
    output = tmp_path / "output"
    arguments = trained.test_arguments(output, *ONE_SET, block=BLOCK)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    log = tmp_path / "log"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(SECONDS_A_BATCH="0.01"),
            stdout=file,
            stderr=file,
            start_new_session=True,
            # A shell's background processes ignore it.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            wait_for_search(output)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()
    check_line(log.read_text(encoding="utf-8"), output)
    before = lines(output)
    assert not (output / "quantized/plan.json").exists()
    finished = trained.starter.run(
        SCRIPT, *arguments, cwd=tmp_path, SECONDS_A_BATCH="0"
    )
    assert finished.code == 0, finished.err
    assert lines(output)[: len(before)] == before
    assert (output / "quantized/report.html").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_exit_status_of_a_signal(trained, tmp_path, number, status):
    output = tmp_path / "output"
    arguments = trained.test_arguments(output, *ONE_SET, block=BLOCK)
    process = trained.starter.start(
        SCRIPT, *arguments, cwd=tmp_path, SECONDS_A_BATCH="0.01"
    )
    wait_for_search(output)
    os.kill(process.pid, number)
    finished = process.wait()
    assert finished.code == status, finished.err
    check_line(finished.err, output)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_attached_from_python(trained, tmp_path):
    """The program that attached it decides what an interruption means."""
    output = tmp_path / "output"
    block = json.dumps({**ATTACHED, "output_folder": f"{output}/quantized"})
    arguments = trained.test_arguments(output, *ONE_SET, block="")
    process = trained.starter.start(
        HERE / "attach.py",
        block,
        *arguments,
        cwd=tmp_path,
        SECONDS_A_BATCH="0.05",
    )
    wait_for_search(output, 1)
    os.kill(process.pid, signal.SIGINT)
    finished = process.wait()
    assert finished.code == 1
    assert "KeyboardInterrupt" in finished.out + finished.err
    assert "quantize: interrupted; start the same command" in finished.err


def test_what_is_raised(capsys):
    with pytest.raises(Interrupted) as caught, explained("go on", True):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    # A recipe's own handling of Ctrl-C is as it was.
    assert isinstance(caught.value, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) as caught, explained("go on", False):
        raise KeyboardInterrupt
    assert type(caught.value) is KeyboardInterrupt
    said = capsys.readouterr().err.splitlines()
    assert said == ["quantize: interrupted; go on"] * 2
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="other"), explained("go on", True):
        raise ValueError("other")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_has_pythons_own_handler():
    """Also where the command had another while it imported."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ending_while_importing():
            own = signal.getsignal(signal.SIGINT)
            assert own is not signal.default_int_handler
            with pytest.raises(KeyboardInterrupt):
                own(signal.SIGINT, None)
            with explained("go on", True):
                now = signal.getsignal(signal.SIGINT)
        assert now is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is now
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with ending_while_importing():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
