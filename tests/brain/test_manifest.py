"""Manifests: what is read from each kind, and the line about a wrong one."""

import json
from pathlib import Path

import pytest

from speechbrain_stablequant.brain.manifest import ManifestError, read_manifest


@pytest.fixture
def audio(tmp_path) -> Path:
    """A folder with files that are only looked for."""
    for name in ("a.wav", "b.flac", "deep/c.wav", "notes.txt"):
        path = tmp_path / "audio" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "audio"


def write(path: Path, text: str) -> Path:
    """A file with a text."""
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(audio, tmp_path):
    text = (
        "ID, duration, wav, spk_id, wrd\n"
        'one, 1.5, $data_root/a.wav, s, "HELLO, WORLD"\n'
        f"two, 2, {audio}/b.flac, s, GOOD DAY\n"
    )
    rows = read_manifest(write(tmp_path / "x.csv", text), audio)
    assert rows == {
        "one": {"wav": str(audio / "a.wav"), "wrd": "HELLO, WORLD"},
        "two": {"wav": str(audio / "b.flac"), "wrd": "GOOD DAY"},
    }


def test_a_relative_path(audio, monkeypatch):
    """Its placeholder is not taken as relative to it."""
    write(audio / "m.csv", "ID,wav\nu1,$data_root/b.flac\n")
    monkeypatch.chdir(audio.parent)
    place = Path(audio.name)
    for rows in (
        read_manifest(place / "m.csv", None),
        read_manifest(str(place / "m.csv"), place),
    ):
        assert rows == {"u1": {"wav": str(audio / "b.flac")}}


def test_json(audio):
    rows = {
        "one": {"wav": "{data_root}/a.wav", "length": 1.5, "words": "{HI}"},
        "two": {"wav": "b.flac", "words": ""},
    }
    path = write(audio / "x.json", json.dumps(rows))
    # Without a root: the manifest's folder.
    assert read_manifest(path, None) == {
        "one": {"wav": str(audio / "a.wav"), "wrd": "{HI}"},
        "two": {"wav": str(audio / "b.flac"), "wrd": ""},
    }


def test_librispeech(audio):
    write(audio / "x.trans.txt", "a ONE TWO\n\nb THREE\n")
    write(audio / "deep" / "y.trans.txt", "c FOUR\n")
    found = read_manifest(audio, None)
    assert {name: row["wrd"] for name, row in found.items()} == {
        "a": "ONE TWO",
        "b": "THREE",
        "c": "FOUR",
    }
    assert found["b"]["wav"] == str(audio / "b.flac")


def test_audio_alone(audio):
    expected = {name: {"wav": str(audio / file)} for name, file in FILES}
    assert read_manifest(audio, None) == expected
    paths = [str(audio / file) for _, file in FILES]
    assert read_manifest(paths, None) == expected


FILES = [("a", "a.wav"), ("b", "b.flac"), ("c", "deep/c.wav")]


def test_files_of_one_name(audio):
    (audio / "deep/a.wav").touch()
    paths = [audio / "a.wav", audio / "deep/a.wav"]
    assert list(read_manifest(paths, None)) == list(map(str, paths))


HEADER = "ID,duration,wav,wrd\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (HEADER + "a,1,a.wav\n", "line 2: does not have the 4 columns"),
        (HEADER + "a,1,a.wav,x,y\n", "line 2: does not have the 4 columns"),
        (HEADER + ",1,a.wav,x\n", "line 2: has no ID"),
        (HEADER + "a,1,,x\n", "line 2, utterance a: has no path in 'wav'"),
        ("ID,path,wrd\na,a.wav,x\n", "utterance a: has no path in 'wav'"),
        (HEADER + "a,0,a.wav,x\n", "utterance a: its duration is '0'"),
        (HEADER + "a,long,a.wav,x\n", "utterance a: its duration is 'long'"),
        (HEADER + "a,nan,a.wav,x\n", "utterance a: its duration is 'nan'"),
        (HEADER + "a,1,a.wav,x\na,1,b.flac,y\n", "line 3, utterance a: its ID"),
        (HEADER + "a,1,no.wav,x\n", "utterance a: there is no file"),
        (HEADER + "a,1,$root/a.wav,x\n", "utterance a: $root/a.wav has a"),
        (HEADER, "holds no utterance"),
        ("ID,wav,start,wrd\na,a.wav,3.5,x\n", "utterance a: has a 'start'"),
    ],
)
def test_wrong_csv(audio, text, line):
    path = write(audio / "x.csv", text)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, None)
    assert str(caught.value).startswith(str(path))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "not a mapping from IDs"),
        ({"a": "a.wav"}, "utterance a: is not a mapping"),
        ({"a": {"wav": ["a.wav"]}}, "utterance a: has no path"),
        ({"a": {"wav": "a.wav", "wrd": 3}}, "utterance a: 'wrd' is not text"),
        (
            {"a": {"wav": "a.wav", "wrd": "x"}, "b": {"wav": "b.flac"}},
            "utterance b has no transcript",
        ),
    ],
)
def test_wrong_json(audio, rows, line):
    path = write(audio / "x.json", json.dumps(rows))
    with pytest.raises(ManifestError, match=line):
        read_manifest(path, None)


def test_other_wrong_manifests(audio):
    for path, line in (
        (write(audio / "x.json", "{"), "is not JSON"),
        (audio / "x.csv", "cannot be read"),
        (audio / "notes.txt", "neither a folder nor"),
        (audio / "nowhere", "neither a folder nor"),
    ):
        with pytest.raises(ManifestError, match=line):
            read_manifest(path, None)
    (audio / "x.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(audio / "x.csv", None)
    write(audio / "x.trans.txt", "a ONE\nmissing TWO\n")
    with pytest.raises(
        ManifestError,
        match=r"x\.trans\.txt, line 2, utterance missing: there is no file",
    ):
        read_manifest(audio, None)
