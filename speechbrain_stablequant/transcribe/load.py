"""Loads a recognizer from a quantized folder."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.decoders import ctc_greedy_decode

from ..folder.errors import CheckpointError
from ..folder.recognizer import QuantizedRecognizer, load_folder
from ..folder.recognizer_spec import RecognizerSpec, interface_of_folder
from ..folder.tokenizer_file import Tokenizer, labels_of
from ..folder.weights_file import model_folder
from ..model.encoders import find_encoders, min_samples
from ..runtimes import cpu
from ..runtimes.choice import candidates
from ..utils.typed import one_line
from .long import Word, words_of_file
from .modules import ModulesRecognizer, load_modules
from .transcriber import Transcriber, check_batch


class Recognizer(Transcriber):
    """A quantized recognizer, made by :func:`load`.

    Any number of threads may call it.

    Arguments
    ---------
    model : QuantizedRecognizer
        From audio to log probabilities, loaded.
    spec : RecognizerSpec
        The recognizer apart from its weights.
    tokenizer : CTCTextEncoder or SentencePieceProcessor
        Filled.
    device : torch.device
        Where it computes.
    """

    def __init__(
        self,
        model: QuantizedRecognizer,
        spec: RecognizerSpec,
        tokenizer: Tokenizer,
        device: torch.device,
    ):
        super().__init__(model, spec.sample_rate, device)
        self.spec = spec
        self.tokenizer = tokenizer
        #: What each output stands for; None where there is no label.
        self.labels = labels_of(tokenizer)
        parts = dict(model.parts.items())
        self._shortest = min_samples(parts)
        (encoder,) = find_encoders(parts)
        #: Samples from one output frame to the next.
        self.stride = math.prod(step for _, step in encoder.conv_geometry())

    def transcribe_batch(
        self, wavs: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[list[str], list[list[int]]]:
        """Transcribes a batch.

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
        list of list of int
            The indices of their tokens.
        """
        if lengths is None:
            lengths = torch.ones(len(wavs))
        found = self.encode_batch(wavs, lengths)
        tokens = ctc_greedy_decode(
            found, lengths.to(found.device), blank_id=self.spec.blank_index
        )
        return [self.text(row) for row in tokens], tokens

    def words(
        self,
        path: str | Path,
        window: int = 16,
        overlap: int = 1,
        batch: int = 1,
        progress: bool = False,
    ) -> Iterator[Word]:
        """Recognizes an audio file of any length, word by word.

        Memory is that of ``batch`` windows. A file that is not longer than a
        window is recognized as :meth:`transcribe_file` does.

        Arguments
        ---------
        path : str or Path
            A local file that soundfile reads.
        window, overlap : int
            Seconds of a window, and those it shares with the next one. A
            window should not be longer than the utterances that the model was
            trained on.
        batch : int
            Windows that are computed at once: more than one pays on a GPU.
        progress : bool
            Whether to show a progress bar.

        Yields
        ------
        Word
            As soon as it is complete, with its times in seconds.

        Raises
        ------
        ValueError
            Names the file, and what is wrong with it.
        """
        yield from words_of_file(self, path, window, overlap, batch, progress)

    def encode_batch(
        self, wavs: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Returns float32 log probabilities, [batch, frames, labels]."""
        check_batch(wavs, lengths)
        if wavs.shape[1] < self._shortest:
            raise ValueError(
                f"audio of {wavs.shape[1]} samples is shorter than one frame "
                f"({self._shortest} samples at {self.spec.sample_rate} Hz)"
            )
        wavs = wavs.to(self.device, torch.float32)
        return self.model(wavs, lengths.to(self.device))

    def text(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, in which CTC has repeated none."""
        known = self.labels
        for index in tokens:
            if index >= len(known) or known[index] is None:
                raise ValueError(
                    f"the model found output {index}, for which the folder's "
                    f"{self.spec.tokenizer_file} has no label; copy or make "
                    "the folder again"
                )
        if isinstance(self.tokenizer, CTCTextEncoder):
            return "".join(known[index] for index in tokens)
        return self.tokenizer.decode_ids(list(tokens))


def check_backend(recognizer: Recognizer | ModulesRecognizer) -> None:
    """Raises a ValueError if the backend cannot run here, before any file."""
    candidates(recognizer.model.backend, recognizer.device)


def leave_out_stated(recognizer: Recognizer | ModulesRecognizer) -> None:
    """Leaves out the line about weights of 7 bits on CPUs without VNNI, if the
    folder's probe has an answer for them."""
    if recognizer.model.probe is not None:
        cpu.logger.setLevel(logging.ERROR)


def load(
    folder: str | Path,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    backend_options: Mapping[str, Any] | None = None,
    trust_source: bool = False,
) -> Recognizer | ModulesRecognizer:
    """Loads a quantized folder.

    Nothing in the folder is executed, unless you trust its authors.

    Arguments
    ---------
    folder : str or Path
        A local folder that a run wrote.
    backend : str
        The runtime; ``auto`` takes the folder's choice, or chooses by device.
    device : str or torch.device
        Where it computes.
    backend_options : Mapping, optional
        Options of the runtime, such as its number of threads; by default those
        in the folder.
    trust_source : bool
        Whether ``hyperparams.yaml`` may be executed, as SpeechBrain does.
        Folders of wav2vec 2.0 and HuBERT with CTC do not need it, all others
        do.

    Returns
    -------
    Recognizer or ModulesRecognizer
        The second is of any other recognizer: it has transcripts, and no
        times of words.

    Raises
    ------
    CheckpointError
        The folder is damaged, holds something else, or needs
        ``trust_source``: one line that names the file.
    ValueError
        An unknown backend, option or device.

    Example
    -------
    >>> load("no/such/folder")
    Traceback (most recent call last):
    speechbrain_stablequant...CheckpointError: no/such/folder: there \
is no such folder; download it first, or give another
    """
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    # The second: of a build of torch without CUDA.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device}: {one_line(error, 200)}") from error
    place = model_folder(folder)
    interface = interface_of_folder(place)
    if interface is not None:
        if not trust_source:
            raise CheckpointError(
                f"{place}: is neither a wav2vec 2.0 nor a HuBERT with CTC, so "
                "SpeechBrain makes it by executing its hyperparams.yaml; if "
                "you trust its authors, pass trust_source=True (--trust-source)"
            )
        return load_modules(place, interface, backend, device, backend_options)
    model, spec, tokenizer = load_folder(folder, backend, backend_options)
    return Recognizer(model.to(device), spec, tokenizer, device)
