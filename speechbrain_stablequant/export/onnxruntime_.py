"""For ONNX Runtime: model.onnx and labels.json."""

from pathlib import Path

from .model import Model

_IMPORTS = """import itertools, json
import onnxruntime, soundfile"""
_RUN = """session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {"wave": wave[None]})"""


def write(model: Model, folder: Path) -> str:
    """Write the folder; returns Markdown that shows its use."""
    model.write(folder / "model.onnx")
    model.write_labels(folder / "labels.json")
    return model.code(_IMPORTS, _RUN)
