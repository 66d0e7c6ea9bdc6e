"""Loads a quantized folder from data files only, without executing anything."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
from speechbrain.dataio.encoder import CTCTextEncoder

from ..runtimes.registry import check_options
from ..utils.typed import one_line
from .errors import CheckpointError
from .recognizer import QuantizedRecognizer
from .recognizer_spec import RecognizerSpec, read_spec
from .tokenizer_file import Tokenizer, read_tokenizer


class LoadedFolder(NamedTuple):
    """The model of a folder, its description and its filled tokenizer."""

    model: QuantizedRecognizer
    spec: RecognizerSpec
    tokenizer: Tokenizer


def load_folder(
    folder: str | Path,
    backend: str = "auto",
    backend_options: Mapping[str, Any] | None = None,
) -> LoadedFolder:
    """Loads a folder on the CPU, as :func:`speechbrain_stablequant.load`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: there is no such folder; download it first, or give "
            "another"
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
        spec = replace(spec, backend=backend)
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
    labels = spec.tokenizer == "labels"
    kind = CTCTextEncoder if labels else sentencepiece.SentencePieceProcessor
    tokenizer = kind()
    read_tokenizer(tokenizer, folder / spec.tokenizer_file)
    return LoadedFolder(model, spec, tokenizer)
