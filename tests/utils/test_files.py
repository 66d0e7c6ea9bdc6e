"""Atomic writing, strict JSON and the check of an output folder."""

import os

import pytest

from speechbrain_stablequant.utils import files
from speechbrain_stablequant.utils.files import (
    check_writable_folder,
    read_json,
    write_atomic,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_writes_text_and_bytes(tmp_path):
    text, data = tmp_path / "a.txt", tmp_path / "a.bin"
    assert write_atomic(text, "é\r\n") == text
    assert write_atomic(str(data), b"\x00\xff") == data
    assert text.read_bytes() == "é\r\n".encode()
    assert data.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a.bin", "a.txt"]


def test_write_atomic_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), KeyboardInterrupt()]
)
def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path, monkeypatch, step, error
):
    path = write_atomic(tmp_path / "plan.json", "old")

    def fail(*_):
        raise error

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(type(error)) as caught:
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["plan.json"]
    if isinstance(error, OSError):
        assert caught.value.filename == str(path)
        assert "No space left" in str(caught.value)


def test_write_atomic_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        write_atomic(tmp_path / "gone" / "a.txt", "x")
    assert missing.value.filename == str(tmp_path / "gone" / "a.txt")
    assert ".tmp" not in str(missing.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"]


def test_json_round_trip_keeps_the_order(tmp_path):
    obj = {"b": [1, 2.5, None, True], "a": {"ü": "ß"}}
    path = write_json(tmp_path / "x.json", obj)
    assert read_json(path, "plan") == obj
    assert path.read_text(encoding="utf-8").startswith('{\n "b": [\n')
    assert path.read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize(
    "obj, reason",
    [
        ({"units": [{"wer": float("nan")}]}, "nan at 'units.0.wer'"),
        ({"a": (1, float("-inf"))}, "-inf at 'a.1'"),
        (float("inf"), "inf"),
        ({"a": {1, 2}}, "Object of type set is not JSON serializable"),
    ],
)
def test_write_json_names_the_value(tmp_path, obj, reason):
    path = write_atomic(tmp_path / "x.json", "old")
    with pytest.raises(ValueError) as error:
        write_json(path, obj)
    assert str(error.value) == f"x.json: cannot be JSON ({reason})"
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "there is no such file"),
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100000, "not valid JSON"),
    ],
)
def test_read_json_names_file_and_reason(tmp_path, content, reason):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_json(path, "plan")
    message = str(error.value)
    assert message.startswith(f"cannot read the plan '{path}': ")
    assert "\n" not in message


def test_read_json_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the plan"):
        read_json(tmp_path, "plan")


def test_check_writable_folder_creates_it_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    assert check_writable_folder(str(folder), "output_folder") == folder
    assert check_writable_folder(folder, "output_folder") == folder
    assert names(folder) == []


@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
def test_check_writable_folder_names_the_file_on_the_way(tmp_path, below):
    file = write_atomic(tmp_path / "results", "x")
    with pytest.raises(ValueError) as error:
        check_writable_folder(file / below, "output_folder")
    assert str(error.value) == (
        f"output_folder: cannot write into the folder '{file / below}' "
        f"('{file}' is no folder); give another folder"
    )
    assert file.read_text() == "x"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied")])
def test_check_writable_folder_proves_it_by_writing(
    tmp_path, monkeypatch, error
):
    # Simulated, because root may write where permission bits say no.
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(files.Path, "write_bytes", fail)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable_folder(tmp_path, "output_folder")


def test_check_writable_folder_read_only(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user writes whatever the permission bits say")
        with pytest.raises(ValueError, match="output_folder: cannot write"):
            check_writable_folder(tmp_path, "output_folder")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_check_writable_folder_refuses_odd_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^output_folder: ") as error:
        check_writable_folder(name, "output_folder")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ("[" * 10**6, "nested too deeply"),
        ('["\\ud800"]', "not UTF-8 text"),
        ('{"\\udfff": 1}', "not UTF-8 text"),
        ("9" * 5000, "not valid JSON"),
    ],
)
def test_json_that_other_functions_cannot_take(tmp_path, text, reason):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_json(path, "plan")
    assert type(caught.value) is ValueError
    assert len(str(caught.value).splitlines()) == 1


def test_json_of_moderate_depth(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 60 + '"\\ud83d\\ude00 \u00e9"' + "]" * 60)
    content = read_json(path, "plan")
    for _ in range(60):
        (content,) = content
    assert content == "\U0001f600 \u00e9"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"plan.json': is no regular file"):
        read_json(tmp_path / "plan.json", "plan")


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the plan .* null"):
        read_json(tmp_path / "a\0b", "plan")
