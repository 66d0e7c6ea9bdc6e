"""Manifests: CSV or JSON of SpeechBrain, LibriSpeech's layout, audio alone."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..utils.typed import one_line, short

#: Utterances by ID: ``wav``, the path of the audio, and ``wrd`` if there are
#: transcripts.
Rows = dict[str, dict[str, str]]

# Columns that recipes use for transcripts.
_TEXTS = ("wrd", "words", "transcript", "text")
_AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3")
# `$data_root` in a CSV, `{data_root}` in a JSON file.
_ROOT = re.compile(r"\$(\w+)|\{(\w+)\}")
# Columns of segments of a recording.
_SEGMENTS = ("start", "stop", "end")


class ManifestError(ValueError):
    """A manifest that cannot be used, or its first wrong row: one line."""


Manifest = str | Path | Sequence[str | Path]


def named(manifest: Manifest) -> str:
    """A manifest in an error message."""
    single = isinstance(manifest, str | Path)
    return str(manifest) if single else short(list(map(str, manifest)))


def read_manifest(manifest: Manifest, data_root: str | Path | None) -> Rows:
    """Read and check a manifest; ``data_root`` None: the folder it is in."""
    if isinstance(manifest, str | Path):
        path = Path(manifest)
        # A placeholder's path must not be taken as relative to it.
        rows = _rows_of(path, Path(data_root or path.parent).absolute())
    else:
        rows = _audio_rows([Path(part) for part in manifest])
    found: Rows = {}
    for where, name, row in rows:
        if name in found:
            raise ManifestError(f"{where}: its ID is there twice")
        if not Path(row["wav"]).is_file():
            raise ManifestError(f"{where}: there is no file {row['wav']}")
        found[name] = row
    if not found:
        raise ManifestError(f"{named(manifest)}: holds no utterance")
    untold = [name for name, row in found.items() if "wrd" not in row]
    if untold and len(untold) < len(found):
        raise ManifestError(
            f"{named(manifest)}: utterance {untold[0]} has no transcript, and "
            "others have one"
        )
    return found


_Row = tuple[str, str, dict[str, str]]


def _rows_of(path: Path, root: Path) -> Iterator[_Row]:
    """Where each utterance stands, its ID, audio and transcript."""
    if path.is_dir():
        texts = sorted(path.rglob("*.trans.txt"))
        if texts:
            return chain.from_iterable(map(_librispeech_rows, texts))
        files = sorted(path.rglob("*"))
        return _audio_rows([x for x in files if x.suffix.lower() in _AUDIO])
    readers = {".csv": _csv_rows, ".json": _json_rows}
    if path.suffix.lower() not in readers:
        raise ManifestError(
            f"{path}: is neither a folder nor a file that ends in .csv or .json"
        )
    try:
        return iter(list(readers[path.suffix.lower()](path, root)))
    except (OSError, UnicodeDecodeError, csv.Error, RecursionError) as error:
        message = f"{path}: cannot be read ({one_line(error)})"
        raise ManifestError(message) from error


def _csv_rows(path: Path, root: Path) -> Iterator[_Row]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ManifestError(
                    f"{where}: does not have the {len(reader.fieldnames)} "
                    "columns of the first line"
                )
            if not row.get("ID"):
                raise ManifestError(f"{where}: has no ID")
            where = f"{where}, utterance {row['ID']}"
            yield where, row["ID"], _checked(row, where, root)


def _json_rows(path: Path, root: Path) -> Iterator[_Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ManifestError(f"{path}: is not JSON ({error})") from error
    if not isinstance(rows, dict):
        raise ManifestError(f"{path}: is not a mapping from IDs to utterances")
    for name, row in rows.items():
        where = f"{path}, utterance {name}"
        if not isinstance(row, dict):
            raise ManifestError(f"{where}: is not a mapping")
        yield where, name, _checked(row, where, root)


def _checked(row: Mapping[str, Any], where: str, root: Path) -> dict[str, str]:
    """The audio and the transcript of a row."""
    for column in _SEGMENTS:
        if row.get(column) not in (None, ""):
            raise ManifestError(
                f"{where}: has a '{column}', and segments of a file are not "
                "read; cut the audio into one file for each utterance"
            )
    duration = row.get("duration")
    try:
        valid = duration in (None, "") or 0 < float(duration) < float("inf")
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ManifestError(
            f"{where}: its duration is {short(duration)}, not seconds"
        )
    path = row.get("wav")
    if not isinstance(path, str) or not path:
        raise ManifestError(f"{where}: has no path in 'wav'")
    names = {name for pair in _ROOT.findall(path) for name in pair if name}
    if names - {"data_root", "data_folder"}:
        raise ManifestError(
            f"{where}: {path} has a placeholder other than data_root"
        )
    found = {"wav": str(root / _ROOT.sub(lambda _: str(root), path))}
    column = next((name for name in _TEXTS if name in row), None)
    if column is not None:
        if not isinstance(row[column], str):
            value = short(row[column])
            raise ManifestError(f"{where}: '{column}' is not text: {value}")
        found["wrd"] = row[column]
    return found


def _librispeech_rows(texts: Path) -> Iterator[_Row]:
    try:
        lines = texts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"{texts}: cannot be read ({one_line(error)})"
        raise ManifestError(message) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, text = line.strip().partition(" ")
        files = [texts.with_name(name + suffix) for suffix in _AUDIO]
        audio = next(filter(Path.is_file, files), files[1])
        where = f"{texts}, line {number}, utterance {name}"
        yield where, name, {"wav": str(audio), "wrd": text.strip()}


def _audio_rows(paths: Sequence[Path]) -> Iterator[_Row]:
    distinct = len({path.stem for path in paths}) == len(paths)
    for path in paths:
        name = path.stem if distinct else str(path)
        yield f"utterance {name}", name, {"wav": str(path)}
