"""Reads audio files; what is wrong with one is a line that names it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from speechbrain.dataio import audio_io

from ..utils.typed import one_line

_UNREADABLE = "cannot be read as audio"
#: A file that was written to a pipe may not tell its length, and libsndfile
#: then gives its largest number.
_MOST_SAMPLES = 1 << 40


@contextmanager
def naming(
    path: str | Path, failure: str = "cannot be transcribed"
) -> Iterator[None]:
    """Context whose errors name a file; ``failure``: what was tried."""
    if not Path(path).is_file():
        if Path(path).is_dir():
            raise ValueError(f"{path}: is a folder; give its audio files")
        raise ValueError(f"{path}: there is no such audio file")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"{path}: {failure} ({one_line(error)})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error, 400)}") from error


def length_of(path: str | Path) -> tuple[int, int]:
    """Samples and sampling rate of a file, by its header."""
    with naming(path, _UNREADABLE):
        info = audio_io.info(str(path))
        if info.num_frames > _MOST_SAMPLES:
            raise ValueError("its header does not tell its length; convert it")
    return info.num_frames, info.sample_rate


def read_audio(
    path: str | Path, start: int = 0, count: int = -1
) -> tuple[torch.Tensor, int]:
    """``count`` samples of a file from ``start``, [samples, channels], and its
    sampling rate."""
    if count < 0:
        length_of(path)
    with naming(path, _UNREADABLE):
        return audio_io.load(
            str(path),
            frame_offset=start,
            num_frames=count,
            channels_first=False,
        )
