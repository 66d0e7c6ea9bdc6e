"""What recognizers of all kinds have in common."""

import math
from pathlib import Path

import torch
from speechbrain.dataio.preprocess import AudioNormalizer

from ..core.plan import QuantizationPlan
from ..folder.live_modules import LiveModules
from ..folder.recognizer import QuantizedRecognizer
from .audio import naming, read_audio

# Limit of the resampling filter: rates without a large common divisor would
# need gigabytes.
_MAX_FILTER = 1 << 24


def check_batch(wavs: torch.Tensor, lengths: torch.Tensor) -> None:
    """Raise ValueError unless audio is [batch, samples] of floats, and its
    relative lengths are [batch]."""
    if wavs.dim() != 2 or lengths.shape != wavs.shape[:1] or not len(wavs):
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


class Transcriber:
    """A loaded recognizer of any kind.

    Arguments
    ---------
    model : QuantizedRecognizer or LiveModules
        What computes.
    sample_rate : int
        That the recognizer was trained with.
    device : torch.device
        Where it computes.
    """

    def __init__(
        self,
        model: QuantizedRecognizer | LiveModules,
        sample_rate: int,
        device: torch.device,
    ):
        self.model = model
        self.sample_rate = sample_rate
        self.device = device
        self._normalizer = AudioNormalizer(sample_rate)

    @property
    def plan(self) -> QuantizationPlan:
        """What was decided for each layer."""
        return self.model.plan

    @property
    def runtime(self) -> str | None:
        """The runtime in use; None before the first batch."""
        return self.model.runtime

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
        if not len(signal):
            raise ValueError(f"{path}: audio of 0 samples; leave it out")
        wanted = self.sample_rate
        common = math.gcd(rate, wanted)
        if (rate // common) * (wanted // common) > _MAX_FILTER:
            raise ValueError(
                f"{path}: audio of {rate} Hz cannot be resampled to {wanted} "
                "Hz; convert it first"
            )
        return self._normalizer(signal.to(self.device), rate)
