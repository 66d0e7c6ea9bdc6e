"""The model of a quantized folder as one ONNX file, for any ONNX engine.

The graph is built from the description of an encoder, not traced: weights stay
int8 in the file, batch and time are dynamic, and padding is masked inside.

A layer's input is clipped to ``[-amax, amax]`` (moved with the zero point) in
front of QuantizeLinear, which alone would go down to -128. Both ends are values
of the grid, so this equals the clamp after rounding of
:mod:`speechbrain_stablequant.core.affine`. ONNX divides by the scale where
``core.affine`` multiplies by its reciprocal: a value within float rounding of a
tie may fall to its other side.
"""

import json
from pathlib import Path
from typing import NamedTuple

from ..core.encoder_spec import describe_encoder
from ..core.integer_layer import in_integers
from ..folder.recognizer import QuantizedRecognizer, load_folder
from ..folder.recognizer_spec import RecognizerSpec
from ..folder.tokenizer_file import labels_of
from ..model.encoders import find_encoders
from ..runtimes.cpu import narrowed
from ..runtimes.onnx_.graph import require_onnx
from ..runtimes.onnx_.model import describe_head, export_onnx


class Described(NamedTuple):
    """A folder's model, its description and the labels of its outputs."""

    model: QuantizedRecognizer
    spec: RecognizerSpec
    labels: list[str | None]


def described(folder: str | Path) -> Described:
    """Load a folder that can be exported."""
    model, spec, tokenizer = load_folder(folder)
    if spec.encoder.output_all_hiddens:
        raise ValueError(
            f"{folder}: a model with output_all_hiddens cannot be exported"
        )
    return Described(model, spec, labels_of(tokenizer))


def export_folder(
    folder: str | Path,
    path: str | Path,
    target: str = "onnxruntime",
    reduce_range: bool = False,
    lengths: bool = True,
    names: tuple[str, str] = ("wave", "logits"),
) -> Path:
    """Writes the model of a quantized folder as one ONNX file.

    Its input is raw audio. The labels, as a JSON list, and the index of the
    blank are in its metadata, under ``labels`` and ``blank_index``.

    Arguments
    ---------
    folder : str or Path
        A folder that :func:`speechbrain_stablequant.load` loads.
    path : str or Path
        The file. Its folder must exist.
    target : str
        ``"onnxruntime"``, or ``"portable"`` with signed activations for other
        engines.
    reduce_range : bool
        Whether weights of 8 bits are rounded to 7, for x86 CPUs without VNNI:
        they add up products of 8 bits in 16, which saturates in silence.
    lengths : bool
        Whether the file has an input of the real samples of each utterance,
        where the model reads them; without it, batches have no padding.
    names : tuple of str
        Of the wave and of the output.

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
    model, spec, labels = described(folder)
    settings = spec.encoder
    integers = {
        name: narrowed(layer).loaded() if reduce_range else layer.loaded()
        for name, layer in in_integers(model.integers()).items()
    }
    heads = {key: model.parts[key] for key in spec.heads}
    parts = {settings.key: model.parts[settings.key]}
    (encoder,) = find_encoders(parts)
    return export_onnx(
        path,
        describe_encoder(encoder.model, encoder.path, integers),
        describe_head(heads, integers),
        normalize_wav=settings.normalize_wav,
        output_norm=settings.output_norm,
        use_lengths=settings.use_lengths and lengths,
        sample_rate=spec.sample_rate,
        target=target,
        names=names,
        metadata={
            "labels": json.dumps(labels, ensure_ascii=False),
            "blank_index": str(spec.blank_index),
        },
    )
