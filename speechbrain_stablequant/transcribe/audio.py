"""Reads audio files; what is wrong with one is a line that names it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from speechbrain.dataio import audio_io
from speechbrain.dataio.preprocess import AudioNormalizer

from ..utils.typed import one_line

# Limit of the resampling filter: rates without a large common divisor would
# need gigabytes.
_MAX_FILTER = 1 << 24


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Context whose errors name a file."""
    if not Path(path).is_file():
        if Path(path).is_dir():
            raise ValueError(f"{path}: is a folder; give its audio files")
        raise ValueError(f"{path}: there is no such audio file")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"{path}: cannot be read as audio ({one_line(error)})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error, 400)}") from error


def length_of(path: str | Path) -> tuple[int, int]:
    """Samples and sampling rate of a file, by its header."""
    with naming(path):
        info = audio_io.info(str(path))
    return info.num_frames, info.sample_rate


def read_audio(
    path: str | Path, start: int = 0, count: int = -1
) -> tuple[torch.Tensor, int]:
    """``count`` samples of a file from ``start``, [samples, channels], and its
    sampling rate."""
    with naming(path):
        return audio_io.load(
            str(path),
            frame_offset=start,
            num_frames=count,
            channels_first=False,
        )


def check_batch(wavs: torch.Tensor, lengths: torch.Tensor) -> None:
    """Raise ValueError unless audio is [batch, samples] of floats, and its
    relative lengths are [batch]."""
    if wavs.dim() != 2 or lengths.shape != wavs.shape[:1]:
        raise ValueError(
            f"audio of shape {list(wavs.shape)} with lengths of shape "
            f"{list(lengths.shape)}; give [batch, samples] and [batch]"
        )
    if not wavs.is_floating_point():
        raise ValueError(f"audio of {wavs.dtype}; give floats from -1 to 1")
    if not bool(((lengths > 0) & (lengths <= 1)).all()):
        raise ValueError(
            f"relative lengths {lengths.tolist()}; give shares above 0, up to 1"
        )


class AudioReader:
    """A recognizer's way to files: its sampling rate, and where it computes.

    Arguments
    ---------
    sample_rate : int
        That the recognizer was trained with.
    device : torch.device
        Where it computes.
    """

    def __init__(self, sample_rate: int, device: torch.device):
        self.sample_rate = sample_rate
        self.device = device
        self._normalizer = AudioNormalizer(sample_rate)

    def transcribe_file(self, path: str | Path) -> str:
        """Transcribes an audio file.

        Arguments
        ---------
        path : str or Path
            A local file that soundfile reads, of any sampling rate and number
            of channels.

        Returns
        -------
        str

        Raises
        ------
        ValueError
            Names the file, and what is wrong with it.
        """
        wave = self.load_audio(path)
        with naming(path):
            words, _ = self.transcribe_batch(wave[None])
        return words[0]

    def load_audio(
        self, path: str | Path, start: int = 0, count: int = -1
    ) -> torch.Tensor:
        """Returns a file's audio, or ``count`` samples of it from ``start``,
        resampled, mono: float32 [samples]."""
        signal, rate = read_audio(path, start, count)
        wanted = self.sample_rate
        common = math.gcd(rate, wanted)
        if (rate // common) * (wanted // common) > _MAX_FILTER:
            raise ValueError(
                f"{path}: audio of {rate} Hz cannot be resampled to {wanted} "
                "Hz; convert it first"
            )
        return self._normalizer(signal.to(self.device), rate)
