"""For ONNX Runtime: model.onnx and labels.json."""

from pathlib import Path

from .model import Model, fenced

_CODE = """import itertools, json
import onnxruntime, soundfile

wave, rate = soundfile.read("speech.wav", dtype="float32")  # {rate} Hz, mono
session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {{"wave": wave[None]}})
known = json.load(open("labels.json"))
best = [i for i, _ in itertools.groupby(logits[0].argmax(-1))]
print("".join(known["labels"][i] for i in best if i != known["blank"]))"""


def write(model: Model, folder: Path) -> str:
    """Write the folder; returns Markdown that shows its use."""
    model.write(folder / "model.onnx")
    model.write_labels(folder / "labels.json")
    return fenced("python", _CODE.format(rate=model.sample_rate))
