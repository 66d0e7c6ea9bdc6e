"""Loads a quantized folder without executing anything in it.

``EncoderASR.from_hparams`` reads ``hyperparams.yaml``, whose tags are calls.
Here only data files are read: safetensors, JSON, labels or a SentencePiece
model. What they say selects among known modules and sizes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sentencepiece
from speechbrain.dataio.encoder import CTCTextEncoder

from ..runtimes.options import check_options
from ..runtimes.registry import RUNTIMES
from ..utils.typed import one_line, short
from .errors import CheckpointError
from .recognizer import QuantizedRecognizer
from .recognizer_spec import RecognizerSpec, read_spec
from .tokenizer_file import read_tokenizer

_BACKENDS = ("auto", *RUNTIMES)


@dataclass(frozen=True)
class LoadedFolder:
    """The model of a folder, its description and its filled tokenizer."""

    model: QuantizedRecognizer
    spec: RecognizerSpec
    tokenizer: CTCTextEncoder | sentencepiece.SentencePieceProcessor


def load_folder(
    folder: str | Path,
    backend: str = "auto",
    backend_options: Mapping[str, Any] | None = None,
) -> LoadedFolder:
    """Loads a folder on the CPU.

    Arguments
    ---------
    folder : str or Path
        A local folder that a run wrote.
    backend : str
        The runtime; ``auto`` takes the folder's choice.
    backend_options : Mapping, optional
        Options of the runtime; by default those in the folder.

    Returns
    -------
    LoadedFolder

    Raises
    ------
    CheckpointError
        The folder is damaged, holds something else, or has modules that only
        code can build.
    ValueError
        An unknown backend or option.
    """
    folder = Path(folder)
    if backend not in _BACKENDS:
        raise ValueError(
            f"backend: {short(backend)} is none of {', '.join(_BACKENDS)}"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: there is no such folder; download it first, or give "
            "another"
        )
    spec, name = read_spec(folder)
    if backend != "auto":
        spec = replace(spec, backend=backend)
    if backend_options is not None:
        spec = replace(spec, backend_options=dict(backend_options))
    if spec.backend not in _BACKENDS:
        raise CheckpointError(
            f"{folder / name}: backend {short(spec.backend)} is none of "
            f"{', '.join(_BACKENDS)}"
        )
    check_options(spec.backend, spec.backend_options)
    try:
        heads = spec.build_heads()
    except ValueError as error:
        reason = one_line(error, 400)
        raise CheckpointError(f"{folder / name}: {reason}") from error
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
    tokenizer = (
        CTCTextEncoder()
        if spec.tokenizer == "labels"
        else sentencepiece.SentencePieceProcessor()
    )
    read_tokenizer(tokenizer, folder / spec.tokenizer_file)
    return LoadedFolder(model, spec, tokenizer)
