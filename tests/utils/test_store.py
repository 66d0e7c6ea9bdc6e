"""What is remembered, under which key, and where it cannot be written."""

import errno
import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch

from speechbrain_stablequant.utils import files, store
from speechbrain_stablequant.utils.files import remove_stale
from speechbrain_stablequant.utils.store import Store, machine_store
from speechbrain_stablequant.utils.tensor_bytes import (
    bytes_to_tensors,
    tensors_to_bytes,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_another_key_is_not_there(tmp_path):
    Store(tmp_path).write("a.json", "k", {"x": [1, 2.5, None, "é"]})
    again = Store(tmp_path)
    assert again.read("a.json", "k", "a") == {"x": [1, 2.5, None, "é"]}
    assert again.read("a.json", "other", "a") is None
    assert again.read("b.json", "k", "b") is None
    again.write("a.json", "other", 1)
    assert again.read("a.json", "k", "a") is None


def test_numbers_as_keys_come_back_as_text(tmp_path):
    Store(tmp_path).write("a.json", "k", {10: (1,), 9: (2,)})
    found = Store(tmp_path).read("a.json", "k", "a")
    assert found == {"10": [1], "9": [2]}


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = {
        "w": torch.randint(-7, 8, (3, 4), dtype=torch.int8),
        "f": torch.tensor([float("nan"), -0.0, 1e-45]),
        "n": torch.zeros(()),
    }
    Store(tmp_path).write_tensors("a.safetensors", "k", tensors, {"e": 1})
    found, content = Store(tmp_path).read_tensors("a.safetensors", "k", "a")
    assert content == {"e": 1}
    assert {n: t.dtype for n, t in found.items()} == {
        n: t.dtype for n, t in tensors.items()
    }
    for name, tensor in tensors.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()
    assert Store(tmp_path).read_tensors("a.safetensors", "l", "a") is None


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("private", [False, True])
def test_a_damaged_file_is_never_believed(tmp_path, private, caplog):
    """Each bit that is flipped is found, or another key is seen."""
    tensors = {"w": torch.arange(5.0)}
    made = Store(tmp_path / "s", private)
    made.write("a.json", "k", {"x": [1, 2.5]})
    made.write_tensors("a.st", "k", tensors, [1])
    folder = tmp_path / "s"
    for name, read in (
        ("a.json", Store.read),
        ("a.st", Store.read_tensors),
    ):
        path = folder / name
        good = path.read_bytes()
        for place in range(len(good)):
            flip(path, place)
            caplog.clear()
            try:
                found = read(Store(folder, private), name, "k", "scores")
            except ValueError as error:
                assert not private
                found, line = None, str(error)
            else:
                line = caplog.text if caplog.records else None
            if line is not None:
                assert f"scores: cannot read '{path}'" in line
                assert line.strip().count("\n") == 0
            if found is not None:
                # white space in the file is not content
                assert name == "a.json" and found == {"x": [1, 2.5]}
            path.write_bytes(good)


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b"null", b"7"])
def test_files_of_something_else(tmp_path, data):
    (tmp_path / "a").write_bytes(data + b"\n")
    one = Store(tmp_path)
    for read in (one.read, one.read_tensors):
        try:
            assert read("a", "k", "scores") is None
        except ValueError as error:
            assert "; delete it, and it is made again" in str(error)
    with pytest.raises(ValueError, match="line 1 is damaged; delete the file"):
        one.rows("a")


def test_rows_and_half_a_line(tmp_path):
    one = Store(tmp_path)
    for number in range(3):
        one.append("j", {"n": number})
    path = tmp_path / "j"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    again = Store(tmp_path)
    assert again.rows("j") == [{"n": 0}, {"n": 1}]
    again.append("j", {"n": 2})
    assert path.read_bytes() == whole
    flip(path, whole.index(b"\n") + 7)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*line 2 is"):
        Store(tmp_path).rows("j")


def test_lines_and_files_of_earlier_versions(tmp_path):
    (tmp_path / "j").write_text('{"key": "old"}\n')
    (tmp_path / "a.json").write_text('{"key": "k", "layers": {}}')
    one = Store(tmp_path)
    one.append("j", {"key": "new"})
    assert one.rows("j") == [{"key": "old"}, {"key": "new"}]
    assert one.read("a.json", "k", "a") is None
    one.check("a.json", "a")


def test_a_damaged_file_is_found_before_its_key_is_known(tmp_path):
    one = Store(tmp_path)
    one.write("a.json", "k", [1])
    one.check("a.json", "scores")
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace("1", "2"))
    with pytest.raises(ValueError, match=r"scores: cannot read '.*a\.json'"):
        one.check("a.json", "scores")


def test_stores_below_say_it_once_together(tmp_path, caplog):
    one = Store(tmp_path / "new")
    assert one.below("") is one
    assert one.below("layers") is one.below("layers")
    one.below("layers").write("a.json", "k", 1)
    assert (tmp_path / "new/layers/a.json").exists()
    (tmp_path / "new/file").write_text("")
    for _ in range(2):
        one.below("file").write("a.json", "k", 1)
    one.below("file").below("x").write("b.json", "k", 1)
    assert len(caplog.records) == 1


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes no byte, until told."""
    state = {"full": True}
    original = os.fsync

    def fsync(fd):
        if state["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return state


def test_a_full_disk_is_one_line_and_nothing_is_lost(
    tmp_path, full_disk, caplog
):
    one = Store(tmp_path)
    one.write("a.json", "k", [1])
    one.append("j", {"n": 1})
    one.append("j", {"n": 2})
    one.write_tensors("t", "k", {"x": torch.ones(2)}, "c")
    assert len(caplog.records) == 1
    assert "a.json: cannot be written (No space left on device)" in caplog.text
    assert one.read("a.json", "k", "a") == [1]
    assert one.read("a.json", "l", "a") is None
    assert one.rows("j") == [{"n": 1}, {"n": 2}]
    assert one.read_tensors("t", "k", "t")[1] == "c"
    assert one.names("*") == ["a.json", "j", "t"]
    assert (tmp_path / "j").read_bytes() == b""
    # Room again: what is in memory is written with the next.
    full_disk["full"] = False
    one.append("j", {"n": 3})
    one.write("b.json", "k", [2])
    again = Store(tmp_path)
    assert again.rows("j") == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert again.read("a.json", "k", "a") == [1]
    assert again.read_tensors("t", "k", "t")[1] == "c"
    assert names(tmp_path) == ["a.json", "b.json", "j", "t"]


def test_two_threads_write_at_once(tmp_path, monkeypatch):
    """The second finds the first one's file among those not yet written."""
    one, original = Store(tmp_path), store.write_atomic

    def write(path, data, mode):
        if path.name == "a.json":
            monkeypatch.setattr(store, "write_atomic", original)
            one.write("b.json", "k", 2)
        return original(path, data, mode)

    monkeypatch.setattr(store, "write_atomic", write)
    one.write("a.json", "k", 1)
    again = Store(tmp_path)
    assert [again.read(f"{n}.json", "k", n) for n in "ab"] == [1, 2]


def test_a_newer_value_is_not_lost(tmp_path, monkeypatch):
    """Another thread gives it while the older one is written."""
    one, original = Store(tmp_path), store.write_atomic

    def write(path, data, mode):
        monkeypatch.setattr(store, "write_atomic", original)
        original(path, data, mode)
        monkeypatch.setattr(one, "_write_files", lambda: None)
        one.write("a.json", "k", 2)
        monkeypatch.undo()
        return path

    monkeypatch.setattr(store, "write_atomic", write)
    one.write("a.json", "k", 1)
    assert one.read("a.json", "k", "a") == 2
    one.flush()
    assert Store(tmp_path).read("a.json", "k", "a") == 2


def test_a_folder_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    one = Store(tmp_path / "file" / "new")
    one.write("a.json", "k", 1)
    one.write("b.json", "k", 2)
    assert len(caplog.records) == 1
    assert one.read("a.json", "k", "a") == 1
    one.delete("a.json")
    assert one.read("a.json", "k", "a") is None


def test_no_folder_is_memory_only(caplog):
    one = Store(None)
    one.write("a.json", "k", 1)
    one.append("j", {"n": 1})
    assert one.read("a.json", "k", "a") == 1
    assert one.rows("j") == [{"n": 1}]
    one.delete("a.json")
    assert one.names() == []
    assert not caplog.records


def test_delete(tmp_path):
    one = Store(tmp_path)
    one.write("a.json", "k", 1)
    one.delete("a.json")
    one.delete("a.json")
    assert names(tmp_path) == []


def test_a_private_folder_is_the_users_alone(tmp_path):
    folder = tmp_path / "cache" / "new"
    before = os.umask(0o002)
    try:
        one = Store(folder, private=True)
        one.write("a.json", "k", 1)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "a.json").stat().st_mode & 0o777 == 0o600
    folder.chmod(0o775)
    Store(folder, private=True)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_others_may_have_written_is_not_believed(
    tmp_path, caplog, monkeypatch
):
    folder = tmp_path / "cache"
    Store(folder, private=True).write("a.json", "k", 1)
    (folder / "a.json").chmod(0o666)
    assert Store(folder, private=True).read("a.json", "k", "trial") is None
    assert "another user owns it or may write it; it is" in caplog.text
    (folder / "a.json").chmod(0o600)
    assert Store(folder, private=True).read("a.json", "k", "trial") == 1
    caplog.clear()
    # The folder of another user: nothing is read, nothing is written.
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    one = Store(folder, private=True)
    assert one.read("a.json", "k", "trial") is None
    one.write("b.json", "k", 2)
    assert one.read("b.json", "k", "trial") == 2
    assert names(folder) == ["a.json"]
    assert len(caplog.records) == 1
    assert "another user owns it" in caplog.text


def test_update_keeps_what_another_process_added(tmp_path):
    one, two = Store(tmp_path), Store(tmp_path)
    one.update("t.json", "k", {"a": 1}, "tiles")
    two.update("t.json", "k", {"b": 2}, "tiles")
    assert one.read("t.json", "k", "tiles") == {"a": 1, "b": 2}
    assert one.update("t.json", "l", {"c": 3}, "tiles") == {"c": 3}


def test_where_a_machine_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = machine_store("probe")
    assert one.folder == tmp_path / "speechbrain_stablequant" / "probe"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert machine_store("probe").folder == (
        tmp_path / "home/.cache/speechbrain_stablequant/probe"
    )

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(store.Path, "home", homeless)
    one = machine_store("probe")
    one.write("a.json", "k", 1)
    assert one.read("a.json", "k", "probe") == 1


def test_files_of_a_killed_process_are_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    owner = f"{files._place()}-{process.pid}-{files._TOKEN}"
    (tmp_path / f".plan.json.{owner}.12345678.tmp").write_text("{")
    # That of a live process, of another machine, of no process at all.
    alive = files._temporary(tmp_path / "a")
    other = alive.with_name(".b.aaaaaa-1-bbbbbb.12345678.tmp")
    mine_before = alive.with_name(
        f".c.{files._place()}-{os.getpid()}-aaaaaa.12345678.tmp"
    )
    for path in (alive, other, mine_before, tmp_path / ".d.tmp"):
        path.write_text("")
    Store(tmp_path)
    assert names(tmp_path) == sorted([alive.name, other.name, ".d.tmp"])
    os.utime(other, (0, 0))
    remove_stale(tmp_path)
    assert names(tmp_path) == sorted([alive.name, ".d.tmp"])


def test_files_of_another_container_are_kept(tmp_path, monkeypatch):
    """It may have the same host name, and has other processes."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for namespace in ("pid:[1]", "pid:[2]"):
        monkeypatch.setattr(os, "readlink", lambda _, name=namespace: name)
        owner = f"{files._place()}-{process.pid}-{files._TOKEN}"
        (tmp_path / f".{namespace}.{owner}.12345678.tmp").write_text("")
    remove_stale(tmp_path)
    (left,) = names(tmp_path)
    assert left.startswith(".pid:[1].")


def test_the_bytes_of_tensors_do_not_depend_on_the_order(tmp_path):
    tensors = {n: torch.full((2,), i) for i, n in enumerate("abcde")}
    metadata = {n: n * 3 for n in "vwxyz"}
    backwards = (
        dict(reversed(tensors.items())),
        dict(reversed(metadata.items())),
    )
    data = tensors_to_bytes(tensors, metadata)
    assert data == tensors_to_bytes(*backwards)
    found, header = bytes_to_tensors(data)
    assert header == metadata
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)
    # For other readers tensors begin at a multiple of 8 bytes.
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_nothing_is_logged_where_all_is_well(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    one = Store(tmp_path / "new", private=True)
    one.write("a.json", "k", 1)
    assert one.read("a.json", "k", "a") == 1
    assert json.loads((tmp_path / "new/a.json").read_text())["key"] == "k"
    assert not caplog.records
