"""Checks the audio files of a data set before long work.

Most checks need the header only. Durations do not reveal whether a pipeline
resamples, since pipelines cut segments and trim silence. So a file's rate is
refused only if the pipeline's waveform is found unchanged in the file.
"""

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch.utils.data import Dataset

# Formats whose samples can be NaN or infinite.
FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")

#: Files per sampling rate that are compared with the pipeline's output; the
#: same pipeline reads all files.
COMPARED = 3

# Maximum and minimum length in samples of the window that is searched for.
_WINDOW, _LEAST = 8000, 64

# Samples of a file that are searched at once.
_BLOCK = 1 << 19

# Minimum correlation of a window that is found unchanged, up to a factor.
_SAME = 0.99


class AudioError(ValueError):
    """An utterance whose audio the recognizer cannot use."""


class _CutOffError(AudioError):
    """A file that ends before its header says it does."""


def check_audio(
    dataset: Dataset,
    audio: str,
    signal: str,
    sample_rate: int,
    min_samples: int = 1,
) -> None:
    """Check each audio file of a SpeechBrain data set, mostly by its header.

    ``audio`` is the column with the paths, ``signal`` the pipeline's output.
    Files of another rate, with several channels, or that cannot be opened here
    are read through the recipe's pipeline, which may convert them.
    """
    if not isinstance(dataset, DynamicItemDataset):
        return
    header_of = functools.cache(_header)
    compared: Counter[int] = Counter()
    for index, name in enumerate(dataset.data_ids):
        path = dataset.data[name].get(audio)
        if not isinstance(path, str) or not path:
            continue
        header, where = header_of(path), f"utterance {name}: {path}"
        if isinstance(header, _CutOffError):
            raise AudioError(f"{where} {header}")
        if isinstance(header, AudioError):
            try:
                wave = _signal_of(dataset, index, signal)
            except Exception as error:
                raise AudioError(f"{where} {header}") from error
            _check_signal(where, wave, min_samples)
            continue
        if header.frames == 0:
            raise AudioError(f"{where} is empty; remove the utterance")
        plain = header.samplerate == sample_rate and header.channels == 1
        if plain:
            _check_long_enough(where, header.frames, min_samples)
        if plain and header.subtype not in FLOAT_SUBTYPES:
            continue
        wave = _signal_of(dataset, index, signal)
        _check_signal(where, wave, min_samples, header.channels)
        rate = header.samplerate
        if rate != sample_rate and compared[rate] < COMPARED:
            compared[rate] += 1
            if is_stretch_of(header, wave):
                raise AudioError(
                    f"{where} is sampled at {rate} Hz and the recipe's "
                    f"pipeline does not resample it to {sample_rate} Hz; "
                    "resample it there, or, if the model was trained at that "
                    f"rate, write quantize.sample_rate: {rate}"
                )


def is_stretch_of(header: Any, wave: torch.Tensor) -> bool:
    """Whether a waveform [samples] is part of a file, up to a factor."""
    sought = _loudest(wave.detach().cpu().numpy().astype(np.float64))
    if len(sought) < _LEAST or not sought.any():
        return False
    with soundfile.SoundFile(header.name) as file:
        for block in file.blocks(
            _BLOCK, len(sought) - 1, dtype="float64", always_2d=True
        ):
            # The pipeline may average the channels, or take one.
            tracks = (
                block.T if header.channels == 1 else [block.mean(1), *block.T]
            )
            if any(_best_match(sought, track) > _SAME for track in tracks):
                return True
    return False


def _loudest(wave: np.ndarray) -> np.ndarray:
    """The window with the highest energy, minus its mean."""
    if len(wave) > _WINDOW:
        energy = np.cumsum(np.concatenate([[0], wave**2]))
        start = int(np.argmax(energy[_WINDOW:] - energy[:-_WINDOW]))
        wave = wave[start : start + _WINDOW]
    return wave - wave.mean() if len(wave) else wave


def _best_match(sought: np.ndarray, track: np.ndarray) -> float:
    """Maximum |correlation coefficient| of a window over all positions."""
    count = len(sought)
    if len(track) < count:
        return 0.0
    size = 1 << (len(track) + count - 1).bit_length()
    spectrum = np.fft.rfft(track, size) * np.fft.rfft(sought, size).conj()
    products = np.fft.irfft(spectrum, size)[: len(track) - count + 1]
    sums, squares = (
        np.cumsum(np.concatenate([[0], x])) for x in (track, track**2)
    )
    means = (sums[count:] - sums[:-count]) / count
    variance = (squares[count:] - squares[:-count]) / count - means**2
    # Nearly constant parts match nothing.
    variance = np.where(variance > 1e-3 * track.var(), variance, np.inf)
    scale = np.sqrt(variance * count) * np.linalg.norm(sought)
    return float(np.abs(products / scale).max())


def _header(path: str) -> Any:
    """What soundfile reads from a header, or an AudioError."""
    if not Path(path).is_file():
        return AudioError("is not there; prepare the data again")
    kind = AudioError
    try:
        header = soundfile.info(path)
        kind = _CutOffError
        if header.frames:
            last, _ = soundfile.read(path, frames=1, start=header.frames - 1)
            if len(last) != 1:
                raise soundfile.LibsndfileError(0, "it ends too early: ")
    # ValueError: a format that cannot be read from its end.
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        return kind(f"cannot be read as audio ({error})")
    return header


def _signal_of(
    dataset: DynamicItemDataset, index: int, signal: str
) -> torch.Tensor:
    """An utterance's audio from the pipeline, without its other outputs."""
    pipeline = dataset.pipeline
    # An output may have another name than the item that it is.
    item = pipeline.output_mapping.get(signal, signal)
    if item not in pipeline.key_to_node:
        raise ValueError(
            f"quantize.signal: the data set has no '{signal}'; name the item "
            "of its pipeline that holds the audio"
        )
    with dataset.output_keys_as({signal: item}):
        return dataset[index][signal]


def _check_long_enough(where: str, samples: int, least: int) -> None:
    if samples < least:
        raise AudioError(
            f"{where} has {samples} samples, fewer than the {least} of one "
            "frame; remove the utterance"
        )


def _check_signal(
    where: str, wave: Any, min_samples: int, channels: int = 1
) -> None:
    if wave.dim() != 1:
        raise AudioError(
            f"{where} has {channels} channels; the recipe's pipeline "
            "must make it mono"
            if channels > 1
            else f"{where} becomes a tensor of shape {tuple(wave.shape)}; the "
            "recipe's pipeline must make it [samples]"
        )
    if not torch.isfinite(wave).all():
        raise AudioError(f"{where} holds NaN or Inf; remove the utterance")
    _check_long_enough(where, wave.shape[0], min_samples)
