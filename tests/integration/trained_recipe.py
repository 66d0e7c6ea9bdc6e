"""The recipe without mention once trained, and runs of it with a block."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from starter import Finished, Starter

from speechbrain_stablequant.runtimes.probe import PREFIX

RECIPE = Path(__file__).resolve().parent / "recipe_without_mention"

BLOCK = """
quantize: !apply:speechbrain_stablequant.register
    target: [wav2vec2, enc, ctc_lin]
    weight_bits: 3
    activation_bits: 2
    method: stablequant
    calibration: {num_utterances: 4}
    search:
        num_utterances: 6
        threshold: 0.25
        cutoffs: [100, 99.9, 99]
    output_folder: !ref <output_folder>/quantized
"""


def probe_size(folder: Path) -> int:
    """Bytes of the probe in a folder's model.safetensors."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(
            file.get_tensor(name).nbytes
            for name in file.keys()  # noqa: SIM118
            if name.startswith(PREFIX)
        )


@dataclass(frozen=True)
class Trained:
    """A trained recipe, and how to run it once more.

    Arguments
    ---------
    starter : Starter
        Runs its script.
    root : Path
        Holds ``encoder``, ``corpus`` and the folder ``trained``.
    finished : Finished
        What the training run left behind.
    """

    starter: Starter
    root: Path
    finished: Finished

    @property
    def output(self) -> Path:
        """The output folder of the training run."""
        return self.root / "trained"

    @property
    def save(self) -> Path:
        """Where its checkpoint is."""
        return self.output / "save"

    def arguments(self, output: Path, *more: object, block: str) -> list:
        """The command line of a run with an output folder of its own."""
        text = (RECIPE / "hparams.yaml").read_text(encoding="utf-8")
        yaml = output.with_name(output.name + ".yaml")
        yaml.write_text(text + block, encoding="utf-8")
        return [
            yaml,
            *("--data_folder", self.root / "corpus"),
            *("--wav2vec2_hub", self.root / "encoder"),
            *("--output_folder", output),
            *("--device", "cpu"),
            *more,
        ]

    def test_arguments(self, output: Path, *more: object, block: str) -> list:
        """The same, to evaluate the trained checkpoint."""
        there = ("--test_only", "--save_folder", self.save)
        return self.arguments(output, *there, *more, block=block)

    def run(self, output: Path, *more: object, block: str = BLOCK) -> Finished:
        """Evaluates the trained checkpoint with a block."""
        arguments = self.test_arguments(output, *more, block=block)
        script = RECIPE / "train.py"
        return self.starter.run(script, *arguments, cwd=output.parent)
