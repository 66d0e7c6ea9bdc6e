"""Small imitations of the corpora that upstream's recipes read.

Each function writes some utterances in a corpus's layout and returns the
recipe's overrides. The speech is real; where a corpus has other texts
(phones, Chinese, semantics), they are made from the words.
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

Splits = Mapping[str, Sequence["Utterance"]]
_HAN = (
    "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以"
)
_PHONES = ("aa", "iy", "eh", "s", "t", "n", "m", "k", "sh", "ow", "uw", "r")


@dataclass(frozen=True)
class Utterance:
    """A recording of a corpus in LibriSpeech's layout."""

    id: str
    audio: Path
    text: str

    @property
    def seconds(self) -> float:
        """Duration."""
        info = soundfile.info(self.audio)
        return info.frames / info.samplerate

    def write(self, path: Path) -> None:
        """Write the recording as a wav file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        samples, rate = soundfile.read(self.audio, dtype="int16")
        soundfile.write(path, samples, rate)


def read(folder: Path) -> list[Utterance]:
    """The utterances of a folder in LibriSpeech's layout, shortest first."""
    rows = []
    for file in sorted(folder.rglob("*.trans.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            # Common Voice's preparation takes apostrophes out.
            if "'" not in text and len(text.split()) > 2:
                audio = file.with_name(f"{name}.flac")
                rows.append(Utterance(name, audio, text))
    return sorted(rows, key=lambda row: (row.seconds, row.id))


def read_splits(folder: Path, sizes: Mapping[str, int]) -> Splits:
    """The shortest utterances of a folder whose characters all occur in the
    first split."""
    rows = read(folder)
    splits, known = {}, set("".join(row.text for row in rows))
    for name, size in sizes.items():
        splits[name] = [row for row in rows if known >= set(row.text)][:size]
        if len(splits[name]) < size:
            raise SystemExit(f"--speech {folder}: has too few utterances")
        rows = [row for row in rows if row not in splits[name]]
        known = {c for row in next(iter(splits.values())) for c in row.text}
    return splits


def _write_csv(path: Path, header: str, rows: Sequence[Sequence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def _noise(folder: Path, splits: Splits) -> None:
    """A folder of noises that counts as downloaded."""
    splits["valid"][0].write(folder / "noise" / "noise0.wav")
    (folder / "noise" / "data.zip").touch()


def librispeech(folder: Path, splits: Splits, csv_folder: str) -> dict:
    """LibriSpeech: flac files and transcripts by speaker and chapter."""
    names = {"train": "train-clean-100", "valid": "dev-clean"}
    names["test"] = "test-clean"
    for split, rows in splits.items():
        for row in rows:
            speaker, chapter, _ = row.id.split("-")
            place = folder / names[split] / speaker / chapter
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(row.audio, place)
            text = place / f"{speaker}-{chapter}.trans.txt"
            with open(text, "a", encoding="utf-8") as file:
                file.write(f"{row.id} {row.text}\n")
    _noise(folder, splits)
    return {
        "train_splits": [names["train"]],
        "dev_splits": [names["valid"]],
        "test_splits": [names["test"]],
        "test_csv": [f"{csv_folder}/test-clean.csv"],
    }


def common_voice(folder: Path, splits: Splits, _: str) -> dict:
    """Common Voice: clips and one tsv file for each split."""
    header = ["client_id", "path", "sentence", "up_votes"]
    for split, rows in splits.items():
        lines = ["\t".join(header)]
        for row in rows:
            row.write(folder / "clips" / f"{row.id}.wav")
            sentence = row.text.capitalize() + "."
            lines.append("\t".join([row.id, f"{row.id}.wav", sentence, "2"]))
        name = "dev" if split == "valid" else split
        text = "\n".join(lines) + "\n"
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    return {}


def han(text: str) -> str:
    """Chinese words that stand for those of a text."""
    digits = [hashlib.md5(word.encode()).digest() for word in text.split()]
    return " ".join(_HAN[d[0] % len(_HAN)] + _HAN[d[1] % 7] for d in digits)


def aishell(folder: Path, splits: Splits, _: str) -> dict:
    """AISHELL-1: wav files by split and speaker, one transcript."""
    lines = []
    for split, rows in splits.items():
        name = "dev" if split == "valid" else split
        for row in rows:
            id = f"BAC009S{row.id.replace('-', 'W')}"
            row.write(folder / "wav" / name / "S0002" / f"{id}.wav")
            lines.append(f"{id} {han(row.text)}\n")
    place = folder / "transcript" / "aishell_transcript_v0.8.txt"
    place.parent.mkdir(parents=True)
    place.write_text("".join(lines), encoding="utf-8")
    _noise(folder, splits)
    return {}


def timit(folder: Path, splits: Splits, _: str) -> dict:
    """TIMIT: wav, wrd and phn files by region and speaker; a phone for each
    letter."""
    speakers = {"train": "train/dr1/fcjf0", "valid": "test/dr1/fadg0"}
    speakers["test"] = "test/dr1/felc0"
    for split, rows in splits.items():
        for row in rows:
            base = folder / speakers[split] / f"sx{row.id.replace('-', '')}"
            row.write(base.with_suffix(".wav"))
            words = [f"0 1 {word}\n" for word in row.text.lower().split()]
            base.with_suffix(".wrd").write_text("".join(words))
            phones = [
                _PHONES[ord(letter) % len(_PHONES)]
                for letter in row.text.replace(" ", "")[::2]
            ]
            rows_ = enumerate(["h#", *phones, "h#"])
            text = "".join(f"{i * 100} {i * 100 + 100} {p}\n" for i, p in rows_)
            base.with_suffix(".phn").write_text(text)
    _noise(folder, splits)
    return {}


def dvoice(folder: Path, splits: Splits, _: str) -> dict:
    """DVoice, Darija: wavs and one table for each split."""
    for split, rows in splits.items():
        lines = ["wav\twords\tduration"]
        for row in rows:
            row.write(folder / "wavs" / f"{row.id}.wav")
            lines.append(f"{row.id}.wav\t{row.text}\t{row.seconds}")
        name = "dev" if split == "valid" else split
        place = folder / "texts" / f"{name}.csv"
        place.parent.mkdir(exist_ok=True)
        place.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {}


def switchboard(folder: Path, splits: Splits, csv_folder: str) -> dict:
    """Switchboard, as its preparation leaves it: segments of whole files."""
    header = "ID,duration,start,stop,channel,wav,words,spk_id"
    for split, rows in splits.items():
        lines = []
        for row in rows:
            wav = folder / f"{row.id}.wav"
            row.write(wav)
            frames = soundfile.info(wav).frames
            lines.append(
                [row.id, row.seconds, 0, frames, "A", wav, row.text, "sw1"]
            )
        name = "dev" if split == "valid" else split
        _write_csv(Path(csv_folder) / f"{name}.csv", header, lines)
    return {
        "skip_prep": True,
        "normalize_words": False,
        "train_tokenizer_csv": f"{csv_folder}/train.csv",
        "test_csv": [f"{csv_folder}/test.csv"],
    }


def media(folder: Path, splits: Splits, csv_folder: str) -> dict:
    """MEDIA, as its preparation leaves it: segments and characters."""
    header = "ID,duration,start,stop,wav,spk_id,char"
    for split, rows in splits.items():
        lines = []
        for row in rows:
            wav = folder / f"{row.id}.wav"
            row.write(wav)
            char = " ".join(row.text.lower().replace(" ", "_"))
            lines.append([row.id, row.seconds, 0, row.seconds, wav, "s", char])
        name = "dev" if split == "valid" else split
        table = Path(csv_folder) / "save" / "csv" / f"{name}.csv"
        _write_csv(table, header, lines)
    return {"skip_prep": True, "channels_path": "none", "concepts_path": "none"}


def slurp_meaning(text: str) -> str:
    """The semantics that SLURP's preparation makes."""
    scenario, action, hour = _meaning(text)
    entities = [{"type": "time", "filler": hour}]
    row = {"scenario": scenario, "action": action, "entities": entities}
    return str(row).replace(",", "|")


def timers_meaning(text: str) -> str:
    """The semantics of Timers and Such."""
    intent, slot, hour = _meaning(text)
    return f"{{'intent': '{intent}'| 'slots': {{'{slot}': {hour}}}}}"


def _meaning(text: str) -> tuple[str, str, str]:
    """Scenario, action and time of a text: made up, the same for a text."""
    scenario, action, *_ = text.lower().split()
    return scenario, action, str(len(text) % 10)


def slurp(folder: Path, splits: Splits, _: str) -> dict:
    """SLURP: flac files and one jsonl for each split."""
    names = {"train": "train_real", "valid": "devel", "test": "test"}
    for place in ("slurp_real", "slurp_synth"):
        (folder / place).mkdir(parents=True)
    synthetic: list[Any] = [(splits["train"][0],)]
    named = [(names[k], "slurp_real", rows) for k, rows in splits.items()]
    for name, place, rows in [
        *named,
        ("train_synthetic", "slurp_synth", *synthetic),
    ]:
        lines = []
        for row in rows:
            shutil.copy(row.audio, folder / place)
            scenario, action, hour = _meaning(row.text)
            recording = {
                "scenario": scenario,
                "action": action,
                "sentence": row.text.lower(),
                "sentence_annotation": f"{scenario} at [time : {hour}]",
                "recordings": [{"file": row.audio.name}],
            }
            lines.append(json.dumps(recording) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {}


def timers(folder: Path, splits: Splits, _: str) -> dict:
    """Timers and Such: wav files and one table for each split."""
    names = {"train": "train", "valid": "dev", "test": "test"}
    for split, rows in splits.items():
        for kind, part in (("real", rows), ("synth", rows[:2])):
            lines = []
            for row in part:
                path = f"{names[split]}-{kind}/{row.id}.wav"
                row.write(folder / path)
                meaning = timers_meaning(row.text)
                lines.append([path, meaning, row.text.lower(), "spk"])
            table = folder / f"{names[split]}-{kind}.csv"
            _write_csv(table, "path,semantics,transcription,speakerId", lines)
    _noise(folder, splits)
    return {}
