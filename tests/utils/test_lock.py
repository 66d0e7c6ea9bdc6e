"""One run at a time in a folder; files that cannot be written."""

import json
import os
import signal
import socket
import time

import filelock
import pytest

from speechbrain_stablequant.utils import lock as lock_module
from speechbrain_stablequant.utils.files import Outputs
from speechbrain_stablequant.utils.lock import FolderInUse, FolderLock

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="other processes are forked ones"
)
KEY = "quantize.output_folder"


def child_that_holds(folder, then=lambda: None):
    """A process that has taken a folder, and sleeps."""
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        FolderLock(folder, KEY).acquire()
        then()
        os.write(told, b"1")
        time.sleep(60)
        os._exit(0)
    assert os.read(ready, 1) == b"1"
    return pid


def killed(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_another_run_is_named(tmp_path):
    pid = child_that_holds(tmp_path)
    try:
        with pytest.raises(FolderInUse) as caught:
            FolderLock(tmp_path, KEY).acquire()
    finally:
        killed(pid)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{KEY}: another run (process {pid} on ")
    assert str(tmp_path) in text and "since 2" in text
    # A dead one is in nobody's way.
    mine = FolderLock(tmp_path, KEY)
    mine.acquire()
    mine.release()


def test_workers_that_outlive_a_killed_run(tmp_path):
    """They hold what it held, for some seconds."""
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        file = open(tmp_path / ".run.lock", "w")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        owner["since"] = "2000"
        (tmp_path / ".run.json").write_text(json.dumps(owner))
        worker = os.fork()
        if worker:
            os.write(told, b"1")
            time.sleep(60)
        time.sleep(1)
        os._exit(0)
    os.read(ready, 1)
    killed(pid)
    began = time.monotonic()
    mine = FolderLock(tmp_path, KEY)
    mine.acquire()
    assert 0.3 < time.monotonic() - began < 10
    mine.release()


def test_one_process_may_take_it_again(tmp_path):
    one, two = FolderLock(tmp_path, KEY), FolderLock(tmp_path, KEY)
    for lock in (one, one, two):
        lock.acquire()
    assert (tmp_path / ".run.json").exists()
    one.release()
    one.release()
    pid = os.fork()
    if not pid:
        # What a parent has taken is not its child's to give back or to use.
        two.release()
        try:
            FolderLock(tmp_path, KEY).acquire()
        except FolderInUse:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    two.release()
    assert not list(tmp_path.iterdir())
    killed(child_that_holds(tmp_path))


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    mine = FolderLock(tmp_path, KEY)
    mine.acquire()
    mine.release()
    assert len(caplog.records) == 1
    assert "cannot be locked (No locks available); start no" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}'])
def test_an_owner_that_cannot_be_read(tmp_path, content, monkeypatch):
    monkeypatch.setattr(lock_module, "PATIENCE", 0.0)
    pid = child_that_holds(tmp_path)
    (tmp_path / ".run.json").write_bytes(content)
    try:
        with pytest.raises(FolderInUse, match="another run works in"):
            FolderLock(tmp_path, KEY).acquire()
    finally:
        killed(pid)


def test_all_files_that_failed_are_named_at_the_end(caplog):
    outputs = Outputs()
    outputs.check()
    with outputs.writing():
        pass
    for name in ("plan.json", "model.safetensors"):
        with outputs.writing():
            raise OSError(28, "No space left on device", name)
    with pytest.raises(ValueError), outputs.writing():
        raise ValueError("something else")
    assert len(caplog.records) == 2
    with pytest.raises(OSError) as caught:
        outputs.check()
    assert str(caught.value).startswith(
        "plan.json, model.safetensors: No space left on device; make room"
    )
    outputs.check()
