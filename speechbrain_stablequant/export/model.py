"""What is exported: a folder's model, labels and sampling rate."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .onnx_file import described, export_folder


def fenced(language: str, code: str) -> str:
    """A code block of Markdown."""
    return f"```{language}\n{code}\n```"


_CODE = """{imports}

wave, rate = soundfile.read("speech.wav", dtype="float32")  # {rate} Hz, mono
{compute}
known = json.load(open("labels.json"))
best = [i for i, _ in itertools.groupby(logits[0].argmax(-1))]
print("".join(known["labels"][i] for i in best if i != known["blank"]))"""


@dataclass(frozen=True)
class Model:
    """A quantized folder.

    Arguments
    ---------
    folder : Path
        The folder.
    reduce_range : bool
        Whether weights of 8 bits are rounded to 7.
    """

    folder: Path
    reduce_range: bool

    @cached_property
    def _described(self):
        return described(self.folder)

    @property
    def bits(self) -> int:
        """Bits of the weights of the plan."""
        return self._described.model.plan.weight_bits

    @property
    def activation_bits(self) -> int:
        """Bits of the activations of the plan."""
        return self._described.model.plan.activation_bits

    @property
    def sample_rate(self) -> int:
        """In Hz."""
        return self._described.spec.sample_rate

    @property
    def normalizes(self) -> bool:
        """Whether it brings audio to mean 0 and variance 1."""
        return self._described.spec.encoder.normalize_wav

    @property
    def blank(self) -> int:
        """Index of CTC's blank."""
        return self._described.spec.blank_index % len(self.labels)

    @property
    def labels(self) -> list[str]:
        """What each output stands for; one without a label is its index."""
        found = self._described.labels
        return [x or f"<{i}>" for i, x in enumerate(found)]

    def lopsided(self) -> str | None:
        """A layer whose input has a zero point."""
        layers = self._described.model.integers().values()
        return next((x.name for x in layers if x.activation_offset), None)

    def write(
        self,
        path: Path,
        target: str = "onnxruntime",
        names: tuple[str, str] = ("wave", "logits"),
    ) -> None:
        """Write its graph, for batches without padding."""
        export_folder(
            self.folder,
            path,
            target,
            self.reduce_range,
            lengths=False,
            names=names,
        )

    def code(self, imports: str, compute: str) -> str:
        """Python, in Markdown, that transcribes a file by the labels of
        :meth:`write_labels`; ``compute``: from ``wave`` to ``logits``."""
        rate = self.sample_rate
        code = _CODE.format(imports=imports, compute=compute, rate=rate)
        return fenced("python", code)

    def write_labels(self, path: Path) -> None:
        """Write labels, blank and sampling rate as JSON."""
        row = {
            "labels": self.labels,
            "blank": self.blank,
            "sample_rate": self.sample_rate,
        }
        text = json.dumps(row, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")
