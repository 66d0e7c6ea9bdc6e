"""The time that a Brain spends recognizing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import speechbrain as sb
import torch

from ..utils.digest import digest, tensor_digest
from ..utils.patching import shadowed
from ..utils.timing import BatchTimes
from .data import audio_of


class ForwardClock:
    """Sums the time of ``compute_forward``: model and decoding, no scoring.

    Excludes warm-up: the first of several batches, and what a runtime compiles
    for a new length.
    """

    def __init__(self, brain: sb.Brain, signal: str, sample_rate: int):
        self.brain = brain
        self.signal = signal
        self.sample_rate = sample_rate
        self._times = BatchTimes(self._synchronize)
        self._audio: list[float] = []
        self._digests: list[str] = []

    @property
    def seconds(self) -> float:
        """Computing time."""
        return sum(self._times.counted(self._times.seconds))

    @property
    def audio_seconds(self) -> float:
        """Duration of the audio recognized in this time."""
        return sum(self._times.counted(self._audio))

    @property
    def audio_digest(self) -> str:
        """Digest of the audio and of its batching."""
        return digest(self._digests)

    @contextmanager
    def running(self) -> Iterator["ForwardClock"]:
        """Measure while the context is open."""
        inner = self.brain.compute_forward

        def timed(batch: Any, *args: Any, **kwargs: Any) -> Any:
            wavs, relative = audio_of(batch, self.signal)
            samples = float((relative * wavs.shape[1]).sum())
            self._digests.append(tensor_digest(wavs, relative))
            with self._times.batch():
                result = inner(batch, *args, **kwargs)
            self._audio.append(samples / self.sample_rate)
            return result

        with shadowed(self.brain, "compute_forward", timed):
            yield self

    def _synchronize(self) -> None:
        if str(self.brain.device).startswith("cuda"):
            torch.cuda.synchronize()
