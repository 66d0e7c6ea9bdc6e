"""Tests of the recipe's data preparation, on audio made here."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

RECIPE = Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "ASR" / "CTC"


@pytest.fixture
def prepare(monkeypatch):
    """The function, imported as the recipe's script does it."""
    monkeypatch.syspath_prepend(str(RECIPE))
    sys.modules.pop("librispeech_prepare", None)
    from librispeech_prepare import prepare_librispeech

    return prepare_librispeech


def add_audio(path, seconds=0.1, rate=16000, channels=1):
    """Writes an audio file of silence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = np.zeros((int(seconds * rate), channels))
    # libsndfile knows a file by its content; it cannot read an empty FLAC.
    soundfile.write(path, audio, rate, format="FLAC" if seconds else "WAV")


def add_chapter(split, speaker, chapter, names, words="HELLO WORLD"):
    """Writes a chapter with its transcripts; gives its folder."""
    folder = split / speaker / chapter
    for name in names:
        add_audio(folder / f"{speaker}-{chapter}-{name}.flac")
    lines = [f"{speaker}-{chapter}-{name} {words}\n" for name in names]
    file = folder / f"{speaker}-{chapter}.trans.txt"
    file.write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def corpus(tmp_path):
    """A corpus of two splits."""
    root = tmp_path / "corpus"
    # Speaker 10 sorts before 9: the IDs are compared as text.
    add_chapter(root / "dev-x", "9", "1", ["0001", "0000"])
    add_chapter(root / "dev-x", "10", "1", ["0000"], "IT'S ME")
    add_chapter(root / "train-x", "3", "7", ["0000"])
    return root


def rows(path):
    """Reads a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_columns_order_and_values(prepare, corpus, tmp_path):
    prepare(str(corpus), [], ["dev-x"], [], str(tmp_path / "out"))
    found = rows(tmp_path / "out" / "dev-x.csv")
    assert list(found[0]) == ["ID", "duration", "wav", "spk_id", "wrd"]
    assert [r["ID"] for r in found] == ["10-1-0000", "9-1-0000", "9-1-0001"]
    assert found[0]["wrd"] == "IT'S ME"
    assert found[0]["spk_id"] == "10-1"
    assert float(found[0]["duration"]) == pytest.approx(0.1)
    assert Path(found[0]["wav"]).is_file()


def test_merged_file(prepare, corpus, tmp_path):
    prepare(
        str(corpus),
        tr_splits=["train-x", "dev-x"],
        save_folder=str(tmp_path),
        merge_lst=["train-x", "dev-x"],
        merge_name="train.csv",
    )
    names = [r["ID"] for r in rows(tmp_path / "train.csv")]
    assert names == ["10-1-0000", "3-7-0000", "9-1-0000", "9-1-0001"]


def test_no_training_split_gives_no_merged_file(prepare, corpus, tmp_path):
    out = tmp_path / "out"
    prepare(str(corpus), [], ["dev-x"], ["dev-x"], str(out), [], "train.csv")
    assert [p.name for p in out.iterdir()] == ["dev-x.csv"]


def test_skip_prep_does_nothing(prepare, tmp_path):
    prepare("nowhere", [], ["x"], [], str(tmp_path / "out"), skip_prep=True)
    assert not (tmp_path / "out").exists()


def test_current_file_is_left_alone(prepare, corpus, tmp_path):
    out = tmp_path / "dev-x.csv"
    prepare(str(corpus), dev_splits=["dev-x"], save_folder=str(tmp_path))
    os.utime(out, (1, 1))
    prepare(str(corpus), dev_splits=["dev-x"], save_folder=str(tmp_path))
    assert out.stat().st_mtime == 1


def test_stale_file_is_replaced(prepare, corpus, tmp_path):
    out = tmp_path / "dev-x.csv"
    out.write_text("ID,duration,wav,spk_id,wrd\n")
    prepare(str(corpus), dev_splits=["dev-x"], save_folder=str(tmp_path))
    assert len(rows(out)) == 3


def test_a_failed_write_keeps_the_old_file(
    prepare, corpus, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dev-x.csv").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare(str(corpus), dev_splits=["dev-x"], save_folder=str(out))
    assert (out / "dev-x.csv").read_text() == "old"
    assert len(list(out.iterdir())) == 1


def error(prepare, kind, corpus, tmp_path, splits=("dev-x",)):
    """Runs the preparation, gives the message of the error that it raises."""
    with pytest.raises(kind) as caught:
        prepare(str(corpus), dev_splits=splits, save_folder=str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    assert not list(tmp_path.glob("*.csv"))
    return message


def test_missing_data_folder(prepare, tmp_path):
    message = error(prepare, FileNotFoundError, "nowhere", tmp_path)
    assert "data_folder" in message and "nowhere" in message


def test_missing_split(prepare, corpus, tmp_path):
    message = error(prepare, FileNotFoundError, corpus, tmp_path, ["dev-clean"])
    assert "dev-clean" in message and "dev-x, train-x" in message


def test_splits_as_text(prepare, corpus, tmp_path):
    message = error(prepare, ValueError, corpus, tmp_path, "dev-x")
    assert message.startswith("dev_splits") and '["dev-x"]' in message


def test_merge_of_an_unknown_split(prepare, corpus, tmp_path):
    with pytest.raises(ValueError, match="merge_lst: other"):
        prepare(str(corpus), save_folder=str(tmp_path), merge_lst=["other"])


def test_split_without_audio(prepare, corpus, tmp_path):
    (corpus / "empty").mkdir()
    message = error(prepare, FileNotFoundError, corpus, tmp_path, ["empty"])
    assert "empty" in message


def test_chapter_without_transcripts(prepare, corpus, tmp_path):
    (corpus / "dev-x" / "9" / "1" / "9-1.trans.txt").unlink()
    message = error(prepare, FileNotFoundError, corpus, tmp_path)
    assert str(Path("9") / "1") in message and ".trans.txt" in message


def test_audio_without_transcript(prepare, corpus, tmp_path):
    add_audio(corpus / "dev-x" / "9" / "1" / "9-1-0007.flac")
    assert "9-1-0007" in error(prepare, ValueError, corpus, tmp_path)


def test_transcript_without_audio(prepare, corpus, tmp_path):
    (corpus / "dev-x" / "9" / "1" / "9-1-0001.flac").unlink()
    message = error(prepare, FileNotFoundError, corpus, tmp_path)
    assert "9-1-0001.flac" in message


def test_transcripts_of_a_chapter_without_any_audio(prepare, corpus, tmp_path):
    (corpus / "dev-x" / "10" / "1" / "10-1-0000.flac").unlink()
    message = error(prepare, FileNotFoundError, corpus, tmp_path)
    assert "10-1-0000.flac" in message


def test_transcript_without_words(prepare, corpus, tmp_path):
    file = corpus / "dev-x" / "9" / "1" / "9-1.trans.txt"
    file.write_text("9-1-0000 HELLO\n9-1-0001\n")
    message = error(prepare, ValueError, corpus, tmp_path)
    assert "9-1.trans.txt:2" in message


def test_transcript_twice(prepare, corpus, tmp_path):
    file = corpus / "dev-x" / "9" / "1" / "9-1.trans.txt"
    file.write_text("9-1-0000 HELLO\n9-1-0001 A\n9-1-0000 HELLO\n")
    message = error(prepare, ValueError, corpus, tmp_path)
    assert "9-1.trans.txt:3" in message and "twice" in message


@pytest.mark.parametrize(
    "audio, words",
    [
        ({"rate": 8000}, "8000 Hz"),
        ({"channels": 2}, "2 channels"),
        ({"seconds": 0}, "no samples"),
    ],
)
def test_unusable_audio(prepare, corpus, tmp_path, audio, words):
    path = corpus / "dev-x" / "9" / "1" / "9-1-0001.flac"
    path.unlink()
    add_audio(path, **audio)
    message = error(prepare, ValueError, corpus, tmp_path)
    assert "9-1-0001.flac" in message and words in message


def test_file_that_is_no_audio(prepare, corpus, tmp_path):
    path = corpus / "dev-x" / "9" / "1" / "9-1-0001.flac"
    path.write_bytes(b"not audio")
    message = error(prepare, ValueError, corpus, tmp_path)
    assert "9-1-0001.flac" in message and "not readable" in message


def test_an_error_in_one_split_writes_no_file(prepare, corpus, tmp_path):
    add_audio(corpus / "train-x" / "3" / "7" / "3-7-0001.flac", rate=8000)
    error(prepare, ValueError, corpus, tmp_path, ["dev-x", "train-x"])
