"""The model of a quantized folder as one ONNX file."""

import json
from pathlib import Path

from ..core.encoder_spec import describe_encoder
from ..folder.load import load_folder
from ..folder.tokenizer_file import labels_of
from ..model.layers import find_encoders
from ..runtimes.cpu import narrowed
from ..runtimes.onnx_.graph import require_onnx
from ..runtimes.onnx_.head import describe_head
from ..runtimes.onnx_.model import export_onnx


def export_folder(
    folder: str | Path,
    path: str | Path,
    target: str = "onnxruntime",
    reduce_range: bool = False,
) -> Path:
    """Writes the model of a quantized folder as one ONNX file.

    It takes audio as it is: the normalization that the model wants is in the
    graph. The labels, as a JSON list, and the index of the blank are in the
    file's metadata, under ``labels`` and ``blank_index``.

    Arguments
    ---------
    folder : str or Path
        A folder that :func:`speechbrain_stablequant.load` loads.
    path : str or Path
        The file. Its folder must exist.
    target : str
        As of :func:`export_onnx`.
    reduce_range : bool
        Whether weights of 8 bits are rounded to 7. An x86 CPU without VNNI
        adds up products of 8 bits in 16, which saturates in silence: a file
        for such a CPU needs it.

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
    require_onnx()
    loaded = load_folder(folder)
    spec, settings = loaded.spec, loaded.spec.encoder
    if settings.output_all_hiddens:
        raise ValueError(
            f"{folder}: a model with output_all_hiddens cannot be exported"
        )
    integers = {
        name: narrowed(layer).loaded() if reduce_range else layer.loaded()
        for name, layer in loaded.model.integers().items()
    }
    parts = loaded.model.parts
    heads = {key: parts[key] for key in spec.heads}
    (encoder,) = find_encoders({settings.key: parts[settings.key]})
    return export_onnx(
        path,
        describe_encoder(encoder.model, encoder.path, integers),
        describe_head(heads, integers),
        normalize_wav=settings.normalize_wav,
        output_norm=settings.output_norm,
        use_lengths=settings.use_lengths,
        sample_rate=spec.sample_rate,
        target=target,
        metadata={
            "labels": json.dumps(
                labels_of(loaded.tokenizer), ensure_ascii=False
            ),
            "blank_index": str(spec.blank_index),
        },
    )
