"""For OpenVINO: model.xml, model.bin and labels.json."""

from pathlib import Path

from .model import Model

_IMPORTS = """import itertools, json
import openvino, soundfile"""
_RUN = """model = openvino.Core().compile_model("model.xml", "CPU")
logits = model([wave[None]])[0]"""


def write(model: Model, folder: Path) -> str:
    """Write the folder; returns Markdown that shows its use."""
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            "target openvino: openvino is not installed; run "
            "pip install 'speechbrain_stablequant[cpu]'"
        ) from error
    graph = folder / "model.onnx"
    model.write(graph, "portable")
    converted = openvino.convert_model(graph)
    openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)
    graph.unlink()
    model.write_labels(folder / "labels.json")
    return model.code(_IMPORTS, _RUN)
