"""Transcripts as text, subtitles or JSON, written word by word."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import click

from ..transcribe.load import ModulesRecognizer, Recognizer
from ..transcribe.long import Word

#: Of a subtitle: its most characters and seconds, and the silence that ends it.
_CHARACTERS, _SECONDS, _PAUSE = 80, 7.0, 0.8


def check_names(files: Sequence[str]) -> None:
    """Raise if two files would write the same transcript."""
    stems: dict[str, str] = {}
    for file in files:
        other = stems.setdefault(Path(file).stem, file)
        if other != file:
            raise ValueError(
                f"{other} and {file} have the same name, and would write the "
                "same transcript; transcribe them one after the other"
            )


def check_form(recognizer: Recognizer | ModulesRecognizer, form: str) -> None:
    """Raise if a recognizer has no times for a form."""
    if form != "txt" and not isinstance(recognizer, Recognizer):
        raise ValueError(
            f"--format {form}: this recognizer gives no times of words, only "
            "wav2vec 2.0 and HuBERT with CTC do; write --format txt"
        )


def words_of(
    recognizer: Recognizer | ModulesRecognizer,
    file: str,
    window: int,
    batch: int,
    progress: bool,
) -> Iterable[Word]:
    """The words of a file; only those of CTC have times."""
    if isinstance(recognizer, Recognizer):
        return recognizer.words(
            file, window=window, batch=batch, progress=progress
        )
    text = recognizer.transcribe_file(file)
    return [Word(word, math.nan, math.nan) for word in text.split()]


def show(
    words: Iterable[Word], file: str, form: str, title: str | None
) -> None:
    """Print a transcript; ``title`` stands before a line of text."""
    texts = _started(words, file, form)
    if title is not None and form == "txt":
        click.echo(f"{title}\t", nl=False)
    for text in texts:
        click.echo(text, nl=False)


def save(words: Iterable[Word], file: str, form: str, folder: Path) -> None:
    """Write a transcript; what is there of an unfinished one ends in .part."""
    place = folder / f"{Path(file).stem}.{form}"
    part = place.with_name(f"{place.name}.part")
    texts = _started(words, file, form)
    with open(part, "w", encoding="utf-8") as out:
        for text in texts:
            out.write(text)
            out.flush()
    part.replace(place)


def _started(words: Iterable[Word], file: str, form: str) -> Iterator[str]:
    """The parts of a transcript; the first one is there already, so that a
    file that cannot be read leaves nothing."""
    texts = _FORMS[form](words, file)
    # Subtitles of silence are none.
    first = next(texts, "")
    return chain([first], texts)


def _text(words: Iterable[Word], file: str) -> Iterator[str]:
    before = ""
    for word in words:
        yield f"{before}{word.text}"
        before = " "
    yield "\n"


def _json(words: Iterable[Word], file: str) -> Iterator[str]:
    """One line: the file, its text and its words."""
    before = f'{{"file": {json.dumps(file, ensure_ascii=False)}, "words": ['
    texts = []
    for word in words:
        yield before + json.dumps(asdict(word), ensure_ascii=False)
        texts.append(word.text)
        before = ", "
    text = json.dumps(" ".join(texts), ensure_ascii=False)
    yield f'{"" if texts else before}], "text": {text}}}\n'


def _subtitles(words: Iterable[Word], file: str) -> Iterator[str]:
    for number, line in enumerate(_lines(words), 1):
        start, end = _time(line[0].start), _time(line[-1].end)
        text = " ".join(word.text for word in line)
        yield f"{number}\n{start} --> {end}\n{text}\n\n"


def _lines(words: Iterable[Word]) -> Iterator[list[Word]]:
    line: list[Word] = []
    for word in words:
        if line and (
            word.start - line[-1].end > _PAUSE
            or word.end - line[0].start > _SECONDS
            or sum(len(x.text) + 1 for x in line) + len(word.text) > _CHARACTERS
        ):
            yield line
            line = []
        line.append(word)
    if line:
        yield line


def _time(seconds: float) -> str:
    whole, milli = divmod(round(seconds * 1000), 1000)
    hours, rest = divmod(whole, 3600)
    return f"{hours:02}:{rest // 60:02}:{rest % 60:02},{milli:03}"


_FORMS: dict[str, Callable[[Iterable[Word], str], Iterator[str]]] = {
    "txt": _text,
    "srt": _subtitles,
    "json": _json,
}
