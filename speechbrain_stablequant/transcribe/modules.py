"""Recognizers of any architecture, which SpeechBrain makes from a quantized
folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import speechbrain.inference.ASR
import torch
from speechbrain.inference.interfaces import Pretrained

from ..folder.errors import CheckpointError
from ..folder.recognizer import check_finite
from ..folder.recognizer_spec import HYPERPARAMS_FILE
from ..runtimes.choice import candidates
from ..runtimes.registry import check_options
from ..utils.forks import ProcessLock
from ..utils.typed import one_line
from .transcriber import Transcriber, check_batch

#: Seconds that Whisper reads; it drops what is longer.
_WHISPER = 30
#: Windows of features, the least that is recognized, in a second.
_WINDOWS = 40


class ModulesRecognizer(Transcriber):
    """A quantized recognizer of any architecture, made by
    :func:`speechbrain_stablequant.load`.

    Any number of threads may call it; they take turns, since SpeechBrain's
    searchers keep their state.

    Arguments
    ---------
    asr : Pretrained
        SpeechBrain's ``EncoderASR``, ``EncoderDecoderASR`` or ``WhisperASR``.
    device : torch.device
        Where it computes.
    """

    def __init__(self, asr: Pretrained, device: torch.device):
        live = asr.hparams.pretrainer.live
        super().__init__(live, asr.hparams.sample_rate, device)
        #: SpeechBrain's object.
        self.asr = asr
        self._turn = ProcessLock()

    def transcribe_batch(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[list[str], list]:
        """Transcribes a batch, as SpeechBrain's class does.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, samples], at the model's sampling rate.
        lengths : torch.Tensor, optional
            Relative lengths, [batch]; all are whole without them.

        Returns
        -------
        list of str
            The transcripts.
        list
            Their tokens, or hypotheses, as SpeechBrain's class gives them.
        """
        if lengths is None:
            lengths = torch.ones(len(wavs))
        check_batch(wavs, lengths)
        check_finite(wavs)
        samples, rate = wavs.shape[1], self.sample_rate
        if samples * _WINDOWS < rate:
            raise ValueError(f"audio of {samples} samples is too short")
        if (
            type(self.asr).__name__ == "WhisperASR"
            and samples > _WHISPER * rate
        ):
            raise ValueError(
                f"{samples / rate:.1f} s of audio: Whisper reads {_WHISPER} s "
                "at a time; cut it into parts"
            )
        wavs = wavs.to(self.device, torch.float32)
        try:
            with self._turn:
                texts, tokens = self.asr.transcribe_batch(
                    wavs, lengths.to(self.device)
                )
        except ValueError:
            raise
        # Searchers raise anything, such as for audio that is too short.
        except Exception as error:
            raise ValueError(
                f"{samples} samples cannot be transcribed "
                f"({type(error).__name__}: {one_line(error, 300)})"
            ) from error
        # Normalized transcripts of Whisper are lists of words.
        texts = [x if isinstance(x, str) else " ".join(x) for x in texts]
        return texts, tokens


def load_modules(
    folder: Path,
    interface: str,
    backend: str,
    device: torch.device,
    backend_options: Mapping[str, Any] | None,
) -> ModulesRecognizer:
    """Loads a folder in SpeechBrain's class of that name."""
    overrides: dict[str, Any] = {}
    if backend != "auto":
        overrides["backend"] = backend
    if backend_options is not None:
        overrides["backend_options"] = dict(backend_options)
    check_options(backend, backend_options or {})
    candidates(backend, device)
    try:
        asr = getattr(speechbrain.inference.ASR, interface).from_hparams(
            source=str(folder),
            run_opts={"device": str(device)},
            overrides=overrides,
        )
        rate = asr.hparams.sample_rate
        if type(rate) is not int or rate < 1:
            raise ValueError(f"sample_rate: {rate!r} is no number of samples")
        return ModulesRecognizer(asr, device)
    except CheckpointError:
        raise
    # The classes that the YAML names may raise anything.
    except Exception as error:
        raise CheckpointError(
            f"{folder / HYPERPARAMS_FILE}: cannot be made "
            f"({type(error).__name__}: {one_line(error, 300)}); copy or make "
            "the folder again"
        ) from error
