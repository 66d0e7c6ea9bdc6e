"""The recipe without mention once trained, and runs of it with a block."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from safetensors import safe_open
from speechbrain.inference.ASR import EncoderASR
from starter import Finished, Starter

from speechbrain_stablequant import QuantizationPlan
from speechbrain_stablequant.folder.weights_file import load_checkpoint
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


#: The same from Python, without an output folder.
ATTACHED = {
    "weight_bits": 3,
    "activation_bits": 2,
    "calibration": {"num_utterances": 4},
    "search": {"num_utterances": 6, "cutoffs": [100, 99.9, 99]},
}

#: One test set is enough where the search is what matters.
ONE_SET = ("--test_sets", "[clean]")


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def probe_size(folder: Path) -> int:
    """Bytes of the probe in a folder's model.safetensors."""
    with safe_open(folder / "model/model.safetensors", framework="pt") as file:
        return sum(
            file.get_tensor(name).nbytes
            for name in file.keys()  # noqa: SIM118
            if name.startswith(PREFIX)
        )


def check_holds_plan(folder: Path) -> None:
    """Asserts that a folder's weights are the tensors of its plan."""
    plan = QuantizationPlan.load(folder / "plan.json")
    checkpoint = load_checkpoint(folder)
    assert set(checkpoint.integers) == set(plan.quants())
    assert plan.tensors.layers
    for key, tensors in plan.tensors.layers.items():
        found = checkpoint.integers[key].loaded()
        assert torch.equal(found.weight, tensors.weight)
        assert torch.equal(found.weight_scale, tensors.weight_scale)
        if tensors.bias is not None:
            assert torch.equal(found.bias, tensors.bias.half().float())
    for key, value in plan.tensors.floats.items():
        layer = plan.tensors.layers.get(key.removesuffix(".bias"))
        if layer is not None and layer.bias is not None:
            continue  # corrected once more
        found = checkpoint.floats[key]
        assert torch.allclose(found, value, rtol=1e-3, atol=1e-6), key


def check_integers_near_simulation(folder: Path, audio: Path) -> None:
    """Asserts that integers compute about what the simulation does."""
    wave = torch.from_numpy(soundfile.read(audio, dtype="float32")[0])[None]
    simulated, integer = (
        EncoderASR.from_hparams(
            source=str(folder / "model"), overrides={"backend": backend}
        ).encode_batch(wave, torch.ones(1))
        for backend in ("torch", "torch_int8")
    )
    assert torch.isfinite(simulated).all()
    difference = (simulated - integer).abs().mean()
    assert difference < 0.1 * simulated.abs().mean()


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
