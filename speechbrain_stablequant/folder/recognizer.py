"""The model of a quantized folder, from audio to log probabilities.

Runtimes read integer weights one layer at a time; only the simulation has them
as floats.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from speechbrain.dataio.dataio import length_to_mask
from speechbrain.dataio.encoder import CTCTextEncoder
from torch import nn
from torch.nn import functional as F

from ..core.integer_layer import IntegerLayer
from ..model.skeleton import empty_skeleton, folded_norms, has_skeleton
from ..runtimes.build import build_forwards, check_probe
from ..runtimes.probe import Probe, chain
from ..runtimes.registry import RUNTIMES, check_options, select_options
from ..utils.typed import one_line
from .encoder_config import CONFIG_FILE, empty_encoder, read_config
from .errors import CheckpointError
from .recognizer_spec import RecognizerSpec, interface_of_folder, read_spec
from .runtime_slot import BuiltRuntime, RuntimeSlot
from .stored_floats import fill_modules
from .tokenizer_file import Tokenizer, read_tokenizer
from .weights_file import (
    WEIGHTS_FILE,
    Checkpoint,
    load_checkpoint,
    model_folder,
)

logger = logging.getLogger(__name__)


class RuntimeEncoder(nn.Module):
    """SpeechBrain's wrapper without its import of transformers.

    The model returns its last hidden state only.
    """

    def __init__(
        self,
        model: nn.Module,
        normalize_wav: bool,
        output_norm: bool,
        output_all_hiddens: bool = False,
    ):
        super().__init__()
        self.model = model
        self.normalize_wav = normalize_wav
        self.output_norm = output_norm
        self.output_all_hiddens = output_all_hiddens

    def forward(
        self, wav: torch.Tensor, wav_lens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encodes float32 [batch, samples] into [batch, frames, channels]."""
        mask = None
        if wav_lens is not None:
            lengths = torch.round(wav_lens * wav.shape[1])
            mask = length_to_mask(lengths).bool()
        if self.normalize_wav:
            wav = F.layer_norm(wav, wav.shape[1:])
        every = self.output_all_hiddens
        out = self.model(wav, attention_mask=mask, output_hidden_states=every)
        out = out.last_hidden_state
        return F.layer_norm(out, out.shape[1:]) if self.output_norm else out


class QuantizedRecognizer(nn.Module):
    """An encoder and what follows it, from audio to log probabilities.

    Any number of threads may call it. The runtime is built by the first call,
    once; then no lock is held while it computes. A process that is forked
    after :meth:`load` builds its own runtime, or shares the parent's where
    that is safe, and torch computes with one thread there. OpenVINO does not
    work in a child of a process that has used it: an error says so.

    Arguments
    ---------
    checksum : str or None
        Of the ``model.safetensors`` that this was written with; None takes
        whatever the folder holds.
    encoder : dict
        ``key``, the wrapper's settings, and ``use_lengths``: whether the
        recipe tells the encoder what is padding.
    heads : dict
        The modules behind the encoder, by key, in order.
    backend : str
        The runtime; ``auto`` chooses by device, see
        :func:`~speechbrain_stablequant.runtimes.choice.candidates`. Of
        several, the first that passes the folder's probe is used.
    options : dict, optional
        Of the runtime, such as its number of threads.
    """

    def __init__(
        self,
        checksum: str | None,
        encoder: Mapping[str, Any],
        heads: Mapping[str, nn.Module],
        backend: str = "auto",
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.checksum = checksum
        self._wrapper = dict(encoder)
        self._key = self._wrapper.pop("key")
        self._use_lengths = self._wrapper.pop("use_lengths")
        self.backend = backend
        self.options = check_options(backend, options or {})
        self.parts = nn.ModuleDict(heads)
        self.folder: Path | None = None
        self._integers: dict[str, IntegerLayer] | None = None
        self.probe: Probe | None = None
        self._slot = self._new_slot()

    def _new_slot(self) -> RuntimeSlot:
        return RuntimeSlot(self.backend, self._build_runtime, self._install)

    @property
    def runtime(self) -> str | None:
        """The runtime in use; None before the first batch."""
        return self._slot.name

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedRecognizer":
        """Returns a copy that builds its own runtime from the folder."""
        derived = {"_integers": None, "_slot": None}
        twin = memo[id(self)] = type(self).__new__(type(self))
        for module in self.parts.modules():
            # Share the forwards: the original may be computing.
            if "forward" in vars(module):
                memo[id(module.forward)] = module.forward
        vars(twin).update(copy.deepcopy({**vars(self), **derived}, memo))
        twin._slot = twin._new_slot()
        twin._remove_forwards()
        return twin

    def load(self, folder: str | Path, needs: Iterable[str] = ()) -> None:
        """Reads a folder's model; files in ``needs`` must be signed."""
        self.folder = Path(folder).absolute()
        path = self.folder / WEIGHTS_FILE
        checkpoint = self._read(needs)
        count = len(checkpoint.integers) + len(checkpoint.floats)
        self.config = read_config(self.folder / CONFIG_FILE, count)
        self.plan = checkpoint.plan
        row = RUNTIMES.get(self.backend)
        layer_by_layer = row is not None and row.encoder is None
        floats = checkpoint.floats
        if layer_by_layer or not has_skeleton(self.config):
            encoder = self._with_code()
        else:
            skeleton = empty_skeleton(self.config)
            encoder = RuntimeEncoder(skeleton, **self._wrapper)
            floats = folded_norms(floats)
        parts = {self._key: encoder, **self.parts}
        fill_modules(parts, checkpoint.integers, floats, path)
        self.parts = nn.ModuleDict(parts)
        self._integers = checkpoint.integers
        self.probe = checkpoint.probe
        if self.probe is None:
            logger.warning(
                "%s: was written without a probe, so that runtimes are not "
                "checked with it on this machine; quantize again to have one",
                path,
            )
        self._slot = self._new_slot()
        self.eval()

    def integers(self) -> dict[str, IntegerLayer]:
        """Returns the integer layers, whose weights are still in the file."""
        if self._integers is None:
            self._integers = self._read().integers
        return self._integers

    def _read(self, needs: Iterable[str] = ()) -> Checkpoint:
        """Reads the folder; integer weights stay in the file."""
        needs = (CONFIG_FILE, *needs)
        checkpoint = load_checkpoint(self.folder, needs, self.checksum)
        self.checksum = checkpoint.checksum
        return checkpoint

    def _with_code(self) -> nn.Module:
        """Builds the encoder with the code of transformers and SpeechBrain."""
        from ..model.wrapper import StoredEncoder

        return StoredEncoder(empty_encoder(self.config), **self._wrapper)

    def _encoder_with_code(self, device: torch.device) -> nn.Module:
        """Returns the encoder, or builds one with code if it is a skeleton."""
        if not isinstance(self.parts[self._key], RuntimeEncoder):
            return self.parts[self._key]
        encoder = self._with_code()
        checkpoint = self._read()
        inside = f"{self._key}."
        stored = (
            {name: x for name, x in rows.items() if name.startswith(inside)}
            for rows in (checkpoint.integers, checkpoint.floats)
        )
        path = self.folder / WEIGHTS_FILE
        fill_modules({self._key: encoder}, *stored, path)
        return encoder.to(device).eval()

    def train(self, mode: bool = True) -> "QuantizedRecognizer":
        """Stays in evaluation mode: integers are not trained."""
        return super().train(False)

    def _build_runtime(self, name: str, device: torch.device) -> BuiltRuntime:
        """Builds a runtime that answers the probe."""
        parts = dict(self.parts.items())
        if RUNTIMES[name].encoder is None:
            parts[self._key] = self._encoder_with_code(device)
        integers = {n: x.to(device) for n, x in self.integers().items()}
        options = select_options(name, self.options)
        peak = self.plan.residual_amax
        forwards = build_forwards(
            name, parts, integers, residual_amax=peak, **options
        )
        if self.probe is not None:
            compute = chain(parts, self._use_lengths, forwards)
            check_probe(name, self.probe, compute, device, options)
        encoder = parts[self._key]
        return BuiltRuntime(name, device, forwards, encoder)

    def _install(self, built: BuiltRuntime | None) -> None:
        """Replaces the forwards of the modules by those of a runtime."""
        if built is None:
            self._remove_forwards()
            return
        self.parts[self._key] = built.encoder
        for module, forward in built.forwards.items():
            module.forward = forward
        # The runtime keeps what it needs; release the second copy.
        self._integers = None

    def _remove_forwards(self) -> None:
        """Restores the modules' own forwards."""
        for module in self.parts.modules():
            vars(module).pop("forward", None)

    @torch.no_grad()
    def forward(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns float32 log probabilities, [batch, frames, labels]."""
        check_finite(wavs)
        if self.folder is None:
            raise RuntimeError("the recognizer is empty; call load() first")
        self._slot.ready(next(self.parameters()).device)
        encoder, *heads = self.parts.values()
        x = encoder(wavs, wav_lens if self._use_lengths else None)
        for head in heads:
            x = head(x)
        return x.float().log_softmax(-1)


def check_finite(wavs: torch.Tensor) -> None:
    """Raises where audio [batch, samples] holds NaN or infinity."""
    good = wavs.isfinite()
    if bool(good.all()):
        return
    row, sample = (~good).nonzero()[0, :2].tolist()
    raise ValueError(
        f"audio: row {row} of the batch holds {float(wavs[row, sample])} at "
        f"sample {sample}; look for a broken file or a division by zero "
        "before the recognizer"
    )


def load_folder(
    folder: str | Path,
    backend: str = "auto",
    backend_options: Mapping[str, Any] | None = None,
) -> tuple[QuantizedRecognizer, RecognizerSpec, Tokenizer]:
    """Loads a folder on the CPU, as :func:`speechbrain_stablequant.load`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: there is no such folder; download it first, or give "
            "another"
        )
    folder = model_folder(folder)
    if interface_of_folder(folder) is not None:
        raise CheckpointError(
            f"{folder}: is neither a wav2vec 2.0 nor a HuBERT with CTC, and "
            "no other model can be exported"
        )
    spec, name = read_spec(folder)
    try:
        heads = spec.build_heads()
        if backend == "auto":
            check_options(spec.backend, spec.backend_options)
    except ValueError as error:
        reason = one_line(error, 400)
        raise CheckpointError(f"{folder / name}: {reason}") from error
    if backend != "auto":
        # The folder's options may be those of its own runtime.
        own = select_options(backend, spec.backend_options)
        spec = replace(spec, backend=backend, backend_options=own)
    if backend_options is not None:
        spec = replace(spec, backend_options=dict(backend_options))
    model = QuantizedRecognizer(
        spec.checksum,
        asdict(spec.encoder),
        heads,
        spec.backend,
        spec.backend_options,
    )
    # The YAML is not signed; it names the checksum of the weights.
    signed = [name] if spec.checksum is None else []
    model.load(folder, needs=[spec.tokenizer_file, *signed])
    tokenizer = sentencepiece.SentencePieceProcessor()
    if spec.tokenizer == "labels":
        tokenizer = CTCTextEncoder()
    read_tokenizer(tokenizer, folder / spec.tokenizer_file)
    return model, spec, tokenizer
