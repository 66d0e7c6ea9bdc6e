"""The model of a quantized folder as one ONNX file."""

import json
from pathlib import Path
from typing import Any

from ..layers import find_encoders
from ..runtime.encoder import describe_encoder
from .graph import require_onnx
from .head import describe_head
from .model import export_onnx


def export_folder(
    folder: str | Path, path: str | Path, target: str = "onnxruntime"
) -> Path:
    """Writes the model of a quantized folder as one ONNX file.

    It takes audio as it is: the normalisation that the model wants is in the
    graph. The labels, as a JSON list, and the index of the blank are in the
    file's metadata, under ``labels`` and ``blank_index``.

    Arguments
    ---------
    folder : str or Path
        A folder that ``EncoderASR.from_hparams`` loads.
    path : str or Path
        The file. Its folder must exist.
    target : str
        As of :func:`export_onnx`.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        onnx is not installed.
    CheckpointError
        The folder is damaged or holds something else.
    ValueError
        A model that cannot be exported.
    """
    # The package below needs no SpeechBrain; this does.
    from hyperpyyaml import load_hyperpyyaml

    from ..checkpoint import load_checkpoint

    require_onnx()
    integers = load_checkpoint(folder).integers
    yaml = Path(folder) / "hyperparams.yaml"
    if not yaml.is_file():
        raise ValueError(
            f"{yaml}: there is no such file; the run that wrote the folder "
            "says in its report why it has no recogniser"
        )
    with open(yaml, encoding="utf-8") as stream:
        hparams = load_hyperpyyaml(stream)
    loader = hparams["pretrainer"]
    loader.collect_files(default_source=str(folder))
    loader.load_collected()
    recogniser, tokenizer = loader.recogniser, loader.tokenizer
    settings = recogniser.encoder_settings
    if settings.get("output_all_hiddens"):
        raise ValueError(
            f"{yaml}: a model with output_all_hiddens cannot be exported"
        )
    parts = dict(recogniser.parts.items())
    (encoder,) = find_encoders({settings["key"]: parts.pop(settings["key"])})
    return export_onnx(
        path,
        describe_encoder(encoder.model, encoder.path, integers),
        describe_head(parts, integers),
        normalize_wav=settings["normalize_wav"],
        output_norm=settings["output_norm"],
        use_lengths=settings["use_lengths"],
        sample_rate=hparams["sample_rate"],
        target=target,
        metadata={
            "labels": json.dumps(_labels(tokenizer), ensure_ascii=False),
            "blank_index": str(hparams["blank_index"]),
        },
    )


def _labels(tokenizer: Any) -> list[str]:
    """What each index stands for, of SpeechBrain's encoder or SentencePiece."""
    if hasattr(tokenizer, "ind2lab"):
        return [tokenizer.ind2lab[i] for i in range(len(tokenizer))]
    return [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
