"""Transcribes audio of any length by overlapping windows, with word times.

Windows are recognized one after the other, so memory does not grow with the
file. Where two overlap, the label of each frame is taken from the first up to
a seam, and from the second after it. A seam lies where both agree, if possible
on a blank: no word is lost or doubled there.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from tqdm import tqdm

from .audio import length_of, naming

if TYPE_CHECKING:
    from .load import Recognizer

_SPACE, _PIECE = " ", "\u2581"
#: Frames before and after a seam that must agree, if possible.
_AGREEMENT = (8, 4, 2, 1)


@dataclass(frozen=True)
class Word:
    """A recognized word, and when it is spoken.

    Arguments
    ---------
    text : str
        The word.
    start, end : float
        Seconds from the beginning of the file.
    """

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class _Windows:
    """Windows of a file, in seconds."""

    starts: Sequence[int]
    length: int
    rate: int  # of the file, in Hz

    @classmethod
    def of(
        cls, path: str | Path, window: int, overlap: int, step: int
    ) -> "_Windows":
        """Those of a file; each starts ``step`` seconds, or a multiple, after
        the one before it."""
        hop = (window - overlap) // step * step
        if not 0 < overlap < window or hop <= overlap:
            raise ValueError(
                f"window {window}, overlap {overlap}: the window must be more "
                "than twice as long as the overlap, in seconds"
            )
        samples, rate = length_of(path)
        seconds = samples / rate
        count = 1 + max(math.ceil((seconds - window) / hop), 0)
        starts = [i * hop for i in range(count)]
        return cls(starts, hop + overlap, rate)

    def load(
        self, recognizer: "Recognizer", path: str | Path, start: int
    ) -> torch.Tensor:
        """Samples of the window at a start, at the model's rate."""
        last = start == self.starts[-1]
        frames = -1 if last else self.length * self.rate
        return recognizer.load_audio(path, start * self.rate, frames)


def words_of_file(
    recognizer: "Recognizer",
    path: str | Path,
    window: int,
    overlap: int,
    batch: int,
    progress: bool,
) -> Iterator[Word]:
    """See :meth:`.load.Recognizer.words`."""
    stride, rate = recognizer.stride, recognizer.spec.sample_rate
    # So many seconds are a whole number of frames.
    step = math.lcm(stride, rate) // rate
    windows = _Windows.of(path, window, overlap, step)
    collapse = _Collapse(recognizer, stride / rate)
    kept: list[int] = []  # Labels of the last window.
    first = 0  # The frame at which it begins.
    bar = tqdm(
        desc=Path(path).name,
        total=len(windows.starts),
        disable=not progress,
        unit="window",
    )
    with bar:
        for start, labels in _labels(recognizer, path, windows, batch):
            frame = start * rate // stride
            if start:
                seam = frame + _seam(kept[frame - first :], labels)
                yield from collapse.feed(
                    kept[collapse.frame - first : seam - first]
                )
            kept, first = labels, frame
            bar.update()
        yield from collapse.feed(kept[collapse.frame - first :])
        yield from collapse.finish()


def _labels(
    recognizer: "Recognizer",
    path: str | Path,
    windows: _Windows,
    batch: int,
) -> Iterator[tuple[int, list[int]]]:
    """The start of each window and the likeliest label of each frame."""
    *whole, last = windows.starts
    groups = [whole[i : i + batch] for i in range(0, len(whole), batch)]
    for group in [*groups, [last]]:
        waves = [windows.load(recognizer, path, start) for start in group]
        with naming(path):
            found = recognizer.encode_batch(
                torch.stack(waves), torch.ones(len(waves))
            )
        yield from zip(group, found.argmax(-1).tolist(), strict=True)


def _seam(before: Sequence[int], after: Sequence[int]) -> int:
    """The frame of an overlap from which the second window counts: the nearest
    to the middle around which both agree, as widely as possible, because a
    label may lie a frame or two later in one of them."""
    size = min(len(before), len(after))
    middle = size // 2
    for wide in _AGREEMENT:
        same = [
            i
            for i in range(wide, size - wide + 1)
            if before[i - wide : i + wide] == after[i - wide : i + wide]
        ]
        if same:
            return min(same, key=lambda i: abs(i - middle))
    return middle


class _Collapse:
    """From the labels of frames to words, as CTC defines it."""

    def __init__(self, recognizer: "Recognizer", seconds: float):
        self._recognizer = recognizer
        self._seconds = seconds  # of a frame
        self._blank = recognizer.spec.blank_index % len(recognizer.labels)
        self._boundary = _boundary(recognizer)
        self._last = self._blank
        self._tokens: list[int] = []
        self._start = self._end = 0
        self.frame = 0  # the next one

    def feed(self, labels: Sequence[int]) -> Iterator[Word]:
        """The words that end within some frames."""
        for label in labels:
            if label not in (self._last, self._blank):
                yield from self._token(label)
            if label != self._blank:
                self._end = self.frame + 1
            self._last = label
            self.frame += 1

    def _token(self, label: int) -> Iterator[Word]:
        text = self._recognizer.labels[label] or ""
        if self._boundary is None or text.startswith(self._boundary):
            yield from self.finish()
        if text == _SPACE:
            return
        if not self._tokens:
            self._start = self.frame
        self._tokens.append(label)

    def finish(self) -> Iterator[Word]:
        """The last word."""
        if self._tokens:
            text = self._recognizer.text(self._tokens).strip()
            start, end = self._start * self._seconds, self._end * self._seconds
            self._tokens = []
            yield Word(text, round(start, 3), round(end, 3))


def _boundary(recognizer: "Recognizer") -> str | None:
    """What begins a word; None where each token is one."""
    labels = [x for x in recognizer.labels if x]
    if isinstance(recognizer.tokenizer, CTCTextEncoder):
        return _SPACE if _SPACE in labels else None
    return _PIECE if any(x.startswith(_PIECE) for x in labels) else None
