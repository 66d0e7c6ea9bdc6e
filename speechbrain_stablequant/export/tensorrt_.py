"""For TensorRT: model.onnx with explicit quantization, and labels.json."""

from pathlib import Path

from .model import Model, fenced

#: Samples of the profile: fewest, best and most, and the batches that go along.
PROFILE = ((1, 16000), (1, 160000), (8, 480000))

_BUILD = (
    "trtexec --onnx=model.onnx --stronglyTyped {shapes} --saveEngine={plan}"
)
_IMPORTS = """import itertools, json, soundfile
from polygraphy.backend.common import BytesFromPath
from polygraphy.backend.trt import EngineFromBytes, TrtRunner"""
_RUN = """with TrtRunner(EngineFromBytes(BytesFromPath("{plan}"))) as runner:
    logits = runner.infer({{"wave": wave[None]}})["logits"]"""
_NOTE = (
    "For TensorRT 10 and later. The file follows the rules of its explicit "
    "quantization; not run here: no GPU."
)


def shapes() -> str:
    """The optimization profile, as options of trtexec."""
    named = zip(("min", "opt", "max"), PROFILE, strict=True)
    return " ".join(f"--{x}Shapes=wave:{b}x{n}" for x, (b, n) in named)


def write(model: Model, folder: Path) -> str:
    """Write the folder; returns Markdown that shows its use."""
    layer = model.lopsided()
    if layer is not None:
        raise ValueError(
            f"{model.folder}: TensorRT has no zero points, and the input of "
            f"{layer} has one; quantize with plus: {{asymmetric: False}}"
        )
    model.write(folder / "model.onnx", "portable")
    model.write_labels(folder / "labels.json")
    plan = "model.plan"
    build = _BUILD.format(shapes=shapes(), plan=plan)
    code = model.code(_IMPORTS, _RUN.format(plan=plan))
    return f"{_NOTE}\n\n{fenced('bash', build)}\n\n{code}"
