"""Data preparation: writes one CSV file for each split of a LibriSpeech
corpus, or of any corpus that has its layout.

Authors
 * The speechbrain_stablequant developers 2026
"""

import csv
import io
import os
from pathlib import Path

import soundfile
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)

SAMPLE_RATE = 16000
COLUMNS = ("ID", "duration", "wav", "spk_id", "wrd")


def prepare_librispeech(
    data_folder: str,
    tr_splits: list = (),
    dev_splits: list = (),
    te_splits: list = (),
    save_folder: str = ".",
    merge_lst: list = (),
    merge_name: str | None = None,
    skip_prep: bool = False,
) -> None:
    """Writes ``<save_folder>/<split>.csv`` for every split, and one CSV file
    that joins several of them.

    The rows are sorted by ID. A file is replaced in one step, and left alone
    when its content would not change.

    Arguments
    ---------
    data_folder : str
        The corpus: the folder that holds one folder for each split.
    tr_splits : list of str
        Splits to train on, e.g. ``["train-clean-100"]``.
    dev_splits : list of str
        Splits to validate on.
    te_splits : list of str
        Splits to test on.
    save_folder : str
        Where the CSV files go.
    merge_lst : list of str
        Splits to join into one more file; they must be among the others.
    merge_name : str
        Name of the joined file, e.g. ``train.csv``.
    skip_prep : bool
        True to do nothing.

    Example
    -------
    >>> data_folder = getfixture("tmpdir").mkdir("corpus")
    >>> chapter = data_folder.mkdir("dev-x").mkdir("1").mkdir("2")
    >>> soundfile.write(f"{chapter}/1-2-0000.flac", [0.0] * 1600, 16000)
    >>> chapter.join("1-2.trans.txt").write("1-2-0000 HELLO WORLD")
    >>> out = str(data_folder.mkdir("out"))
    >>> prepare_librispeech(str(data_folder), dev_splits=["dev-x"],
    ...                     save_folder=out)
    >>> print(open(f"{out}/dev-x.csv").readline().strip())
    ID,duration,wav,spk_id,wrd
    """
    if skip_prep:
        return
    root = Path(data_folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data_folder: {data_folder} is not a folder: give the folder that"
            " holds the splits, e.g. --data_folder /path/to/LibriSpeech"
        )
    for key, value in (
        ("train_splits", tr_splits),
        ("dev_splits", dev_splits),
        ("test_splits", te_splits),
    ):
        if isinstance(value, str):
            raise ValueError(
                f'{key}: {value!r} is a string: write a list, ["{value}"]'
            )
    splits = list(dict.fromkeys([*tr_splits, *dev_splits, *te_splits]))
    for split in splits:
        if not (root / split).is_dir():
            found = sorted(p.name for p in root.iterdir() if p.is_dir())
            raise FileNotFoundError(
                f"{split}: no such split in {data_folder} (it holds: "
                f"{', '.join(found) or 'no folder'}): correct the split's name"
                " or data_folder"
            )
    for split in merge_lst:
        if split not in splits:
            raise ValueError(
                f"merge_lst: {split} is not one of the prepared splits: add"
                " it to tr_splits"
            )

    rows = {split: _read_split(root / split) for split in splits}
    folder = Path(save_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        _write_csv(folder / f"{split}.csv", rows[split])
    if merge_lst and merge_name is not None:
        merged = [row for split in merge_lst for row in rows[split]]
        _write_csv(folder / merge_name, sorted(merged))


def _read_split(split_folder):
    """Reads a split's transcripts and durations.

    Arguments
    ---------
    split_folder : Path
        Folder of SPEAKER/CHAPTER folders.

    Returns
    -------
    list of tuple
        Rows in the order of `COLUMNS`, sorted by ID.
    """
    rows = []
    chapters = sorted({path.parent for path in split_folder.rglob("*.flac")})
    chapters += sorted(
        {path.parent for path in split_folder.rglob("*.trans.txt")}
        - set(chapters)
    )
    if not chapters:
        raise FileNotFoundError(
            f"{split_folder}: no .flac file: a split holds"
            " SPEAKER/CHAPTER/*.flac"
        )
    for chapter in chapters:
        words = _read_transcripts(chapter)
        audios = {path.stem: path for path in chapter.glob("*.flac")}
        for name in sorted(audios.keys() - words.keys()):
            raise ValueError(
                f"{audios[name]}: no transcript: add a line '{name} WORDS' to"
                " the chapter's .trans.txt or remove the audio"
            )
        for name in sorted(words.keys() - audios.keys()):
            raise FileNotFoundError(
                f"{chapter / name}.flac: not found, but its transcript is"
                " there: restore the audio or remove the transcript's line"
            )
        for name, path in audios.items():
            speaker = "-".join(name.split("-")[:2])
            duration = _duration(path)
            rows.append((name, f"{duration}", str(path), speaker, words[name]))
    return sorted(rows)


def _read_transcripts(chapter):
    """Reads a chapter's ``*.trans.txt``: one ``ID WORDS`` on each line.

    Arguments
    ---------
    chapter : Path
        The chapter's folder.

    Returns
    -------
    dict
        Utterance ID -> words.
    """
    files = sorted(chapter.glob("*.trans.txt"))
    if not files:
        raise FileNotFoundError(
            f"{chapter}: no .trans.txt file beside the audio: add the"
            " chapter's transcripts"
        )
    words = {}
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name, _, text = line.strip().partition(" ")
            text = " ".join(text.split())
            if not text:
                raise ValueError(
                    f"{file}:{number}: {name} has no words: write"
                    " 'ID WORDS' or remove the line"
                )
            if name in words:
                raise ValueError(
                    f"{file}:{number}: {name} is there twice: keep one line"
                )
            words[name] = text
    return words


def _duration(path):
    """Checks an audio file and gives its length.

    Arguments
    ---------
    path : Path
        The file.

    Returns
    -------
    float
        Seconds.
    """
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{path}: not readable as audio ({error.error_string.strip()}):"
            " restore the file"
        ) from None
    if info.frames <= 0:
        raise ValueError(f"{path}: no samples: restore or remove the file")
    if info.samplerate != SAMPLE_RATE:
        raise ValueError(
            f"{path}: {info.samplerate} Hz: resample it to {SAMPLE_RATE} Hz"
        )
    if info.channels != 1:
        raise ValueError(
            f"{path}: {info.channels} channels: convert it to mono"
        )
    return info.frames / info.samplerate


def _write_csv(path, rows):
    """Writes a CSV file in one step, unless it is there with this content.

    Arguments
    ---------
    path : Path
        The file.
    rows : list of tuple
        Rows in the order of `COLUMNS`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    content = text.getvalue().encode("utf-8")
    if path.is_file() and path.read_bytes() == content:
        logger.info(f"{path} is up to date.")
        return
    # A reader never sees half a file, even if this process is killed.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    logger.info(f"{path}: {len(rows)} utterances.")
