"""Loads a folder in SpeechBrain's class and compares its transcripts with
those of its report."""

import csv
import json
import tempfile
import time
from collections.abc import Container
from pathlib import Path


def read_manifest(path: Path) -> dict[str, str]:
    """The audio file of each utterance of a CSV or JSON manifest."""
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {id: row["wav"] for id, row in rows.items()}
    with open(path, newline="", encoding="utf-8") as file:
        return {row["ID"]: row["wav"] for row in csv.DictReader(file)}


def texts_of(folder: Path, files: Container[str]) -> tuple[dict, bool]:
    """What the report says that the folder says of these files, and whether
    this is what the recipe's own decoding says."""
    for file in sorted(folder.glob("transcripts_*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))["content"]
        same = not content.get("folder")
        rows = content["transcripts" if same else "folder"]
        if all(row["id"] in files for row in rows):
            return {row["id"]: row["hypothesis"] for row in rows}, same
    raise ValueError(f"{folder}: no transcripts of the manifest's utterances")


def _letters(text: str) -> str:
    """A text without its spaces, which are labels `_` in some recipes."""
    return "".join(text.replace("_", " ").split())


def main(
    name: str, folder: Path, manifest: Path, results: Path, data: Path
) -> None:
    """Transcribes the files of a manifest and writes what differs."""
    # The recipes' SpeechBrain, which is not yet found above.
    from speechbrain.inference import ASR

    with tempfile.TemporaryDirectory() as savedir:
        recognizer = getattr(ASR, name).from_hparams(
            source=str(folder / "model"), savedir=savedir
        )
        files = read_manifest(manifest)
        reported, same = texts_of(folder, files)
        started, heard = time.monotonic(), {}
        for id in reported:
            text = recognizer.transcribe_file(
                files[id].replace("$data_root", str(data))
            )
            if not isinstance(text, str):
                text = " ".join(
                    s if isinstance(s, str) else s.words for s in text
                )
            heard[id] = text
        seconds = time.monotonic() - started
    different = {
        id: [text, heard[id]]
        for id, text in reported.items()
        if _letters(text) != _letters(heard[id])
    }
    spaced = sum(t.split() != heard[id].split() for id, t in reported.items())
    said = "" if any(map(str.strip, heard.values())) else "all empty"
    row = {
        "equal": not different,
        "decodes_as_recipe": same,
        "different": different,
        "different_spaces": spaced,
        "check_seconds": seconds,
        "check_said": said,
    }
    results.write_text(json.dumps(row, indent=1, ensure_ascii=False))
