"""Recognizers of any architecture from a quantized folder, in SpeechBrain's
classes, of which nothing but parts of models is made."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import speechbrain.inference.ASR
import torch
from speechbrain.inference.interfaces import Pretrained

from ..core.plan import QuantizationPlan
from ..folder.errors import CheckpointError, reading
from ..folder.live_modules import LiveModules
from ..folder.recognizer import check_finite
from ..folder.recognizer_spec import HYPERPARAMS_FILE
from ..folder.trusted_yaml import interface_of, untrusted
from ..folder.weights_file import model_folder
from ..runtimes.registry import select_options
from ..utils.files import read_file
from ..utils.typed import one_line
from ..utils.yaml_tree import parse_yaml
from .audio import AudioReader

#: Seconds that Whisper reads; it drops what is longer.
_WHISPER = 30


class ModulesRecognizer(AudioReader):
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
        super().__init__(asr.hparams.sample_rate, device)
        #: SpeechBrain's object.
        self.asr = asr
        #: Its modules, and the runtime that computes them.
        self.model: LiveModules = asr.hparams.pretrainer.live
        # A forked process does not wait for a thread of its parent.
        self._turns: dict[int, threading.Lock] = {}

    @property
    def plan(self) -> QuantizationPlan:
        """What was decided for each layer."""
        return self.model.plan

    @property
    def runtime(self) -> str | None:
        """The runtime in use; None before the first batch."""
        return self.model.runtime

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
        check_finite(wavs)
        seconds = wavs.shape[1] / self.sample_rate
        kind = type(self.asr).__name__
        if kind == "WhisperASR" and seconds > _WHISPER:
            raise ValueError(
                f"{seconds:.1f} s of audio: Whisper reads {_WHISPER} s at a "
                "time; cut it into parts"
            )
        wavs = wavs.to(self.device, torch.float32)
        with self._turns.setdefault(os.getpid(), threading.Lock()):
            texts, tokens = self.asr.transcribe_batch(
                wavs, lengths.to(self.device)
            )
        # Normalized transcripts of Whisper are lists of words.
        texts = [x if isinstance(x, str) else " ".join(x) for x in texts]
        return texts, tokens


def load_modules(
    folder: str | Path,
    backend: str,
    device: torch.device,
    backend_options: Mapping[str, Any] | None,
) -> ModulesRecognizer:
    """Loads a folder of a recognizer of any architecture; its YAML is read as
    data before anything is made."""
    folder = model_folder(folder)
    path = folder / HYPERPARAMS_FILE
    with reading(path, "is not to be loaded", "copy or make the folder again"):
        tree = parse_yaml(read_file(path).decode("utf-8"))
        kind = interface_of(tree)
        if kind is None:
            raise ValueError("it is of none of SpeechBrain's classes")
        found = untrusted(path, ours=True)
        if found is not None:
            raise ValueError(found)
        if (folder / "custom.py").exists():
            raise ValueError("the folder holds custom.py, code of its own")
        overrides: dict[str, Any] = {}
        if backend != "auto":
            # The folder's options may be those of its own runtime.
            own = select_options(backend, tree.get("backend_options") or {})
            overrides = {"backend": backend, "backend_options": own}
        if backend_options is not None:
            overrides["backend_options"] = dict(backend_options)
    interface = getattr(speechbrain.inference.ASR, kind)
    try:
        asr = interface.from_hparams(
            source=str(folder),
            run_opts={"device": str(device)},
            overrides=overrides,
        )
    except CheckpointError:
        raise
    # The classes that the YAML names may raise anything.
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be made ({type(error).__name__}: "
            f"{one_line(error, 300)}); copy or make the folder again"
        ) from error
    return ModulesRecognizer(asr, device)
