"""For sherpa-onnx: model.onnx and tokens.txt."""

from pathlib import Path

from .model import Model, fenced

_CODE = """# pip install sherpa-onnx soundfile; then in this folder:
import sherpa_onnx, soundfile

wave, rate = soundfile.read("speech.wav", dtype="float32")
# its loader of any wav2vec 2.0 or HuBERT CTC graph
make = sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc
recognizer = make("model.onnx", "tokens.txt")
stream = recognizer.create_stream()
stream.accept_waveform(rate, wave)
recognizer.decode_stream(stream)
print(stream.result.text)"""

# The engine's blank, and the space of SentencePiece, which it replaces.
_BLANK, _SPACE = "<blk>", "\u2581"


def write(model: Model, folder: Path) -> str:
    """Write the folder; returns Markdown that shows its use."""
    if model.blank != 0:
        raise ValueError(
            f"{model.folder}: sherpa-onnx needs CTC's blank at index 0, here "
            f"it is {model.blank}"
        )
    if not model.normalizes:
        raise ValueError(
            f"{model.folder}: sherpa-onnx brings audio to mean 0 and variance "
            "1, which this model was not trained on (normalize_wav: False)"
        )
    if model.sample_rate != 16000:
        raise ValueError(
            f"{model.folder}: sherpa-onnx feeds audio of 16000 Hz, and the "
            f"model takes {model.sample_rate}"
        )
    model.write(folder / "model.onnx")
    labels = [_BLANK, *(x.replace(" ", _SPACE) for x in model.labels[1:])]
    rows = [f"{label} {index}\n" for index, label in enumerate(labels)]
    (folder / "tokens.txt").write_text("".join(rows), encoding="utf-8")
    return fenced("python", _CODE)
