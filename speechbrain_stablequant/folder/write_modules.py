"""Writes the folder of any recognizer that an inference YAML describes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from torch import nn

from ..core.integer_layer import IntegerLayer
from ..core.plan import QuantizationPlan
from ..runtimes.probe import Probe
from ..utils.files import write_atomic
from .module_state import (
    COMPUTED,
    computed_buffers,
    hidden_state,
    training_buffers,
)
from .recognizer_spec import HYPERPARAMS_FILE
from .stored_floats import float_state
from .weights_file import save_checkpoint

_HEAD = """\
# A quantized speech recognizer, written by speechbrain_stablequant:
#
#   from speechbrain.inference.ASR import {interface}
#   asr = {interface}.from_hparams(source="this folder")
#   print(asr.transcribe_file("speech.flac"))
#
# The runtime is chosen by device; run_opts={{"device": "cuda"}} and
# overrides={{"backend": "torch"}} force one.
backend: {backend}
backend_options: {{}}

"""

_LOADER = """
pretrainer: !new:speechbrain_stablequant.inference.ModulesLoader
    checksum: {checksum}
    modules:{modules}
    encoder: [{encoder}]
    backend: !ref <backend>
    options: !ref <backend_options>
"""


@dataclass(frozen=True)
class ModulesSource:
    """What the folder of a recognizer needs beside its weights."""

    #: The inference YAML without its pretrainer.
    text: str = field(repr=False)
    #: SpeechBrain's class that loads it.
    interface: str
    #: Place in the YAML of each module, by the name that the plan gives it:
    #: a key, and the path inside of its module.
    places: dict[str, tuple[str, str]]
    #: Keys of what computes the encoder's output.
    encoder: tuple[str, ...]
    #: Keys of the modules that are made when the folder's files are there.
    late: tuple[str, ...]
    #: File of the tokenizer, if the YAML has one.
    tokenizer_file: str | None
    #: Content of files by name.
    files: dict[str, bytes] = field(repr=False)
    sample_rate: int

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the modules that the folder holds."""
        return tuple(self.places)

    def hyperparams(self, checksum: str | None, backend: str = "auto") -> str:
        """Returns the text of ``hyperparams.yaml``."""
        places = [
            f"\n        {name}: "
            + (f"[!ref <{key}>, {path}]" if path else f"!ref <{key}>")
            for name, (key, path) in self.places.items()
        ]
        loader = _LOADER.format(
            checksum=json.dumps(checksum),
            modules="".join(places),
            encoder=", ".join(f"!ref <{key}>" for key in self.encoder),
        )
        if self.tokenizer_file is not None:
            file = json.dumps(self.tokenizer_file)
            loader += (
                f"    tokenizer: !ref <tokenizer>\n    tokenizer_file: {file}\n"
            )
        if self.late:
            late = ", ".join(f"!ref <{key}>" for key in self.late)
            loader += f"    late: [{late}]\n"
        head = _HEAD.format(interface=self.interface, backend=backend)
        return f"{head}{self.text.rstrip()}\n{loader}"


def write_modules(
    folder: Path,
    modules: Mapping[str, nn.Module],
    plan: QuantizationPlan,
    integers: Mapping[str, IntegerLayer],
    float_dtype: str,
    source: ModulesSource,
    backend: str,
) -> Probe | None:
    """As :func:`~.write.write_folder`, for an inference YAML."""
    for name, content in source.files.items():
        write_atomic(folder / name, content)
    floats = float_state(modules, integers)
    made = _newly_made(source, folder)
    computed = computed_buffers(modules, made, float_dtype)
    kept = floats.keys() - training_buffers(modules).keys() - computed.keys()
    floats = {
        **{name: x for name, x in floats.items() if name in kept},
        **{COMPUTED + k: x for k, x in computed.items() if k in floats},
        **hidden_state(modules),
    }
    save = [folder, plan, integers, floats, float_dtype, list(source.files)]
    checksum = save_checkpoint(*save)
    with torch.random.fork_rng([]):
        loader = load_modules(source.hyperparams(checksum), folder)
    probe = loader.live.make_probe(source.sample_rate)
    checksum = save_checkpoint(*save, probe)
    text = source.hyperparams(checksum, backend)
    write_atomic(folder / HYPERPARAMS_FILE, text)
    return probe


def _newly_made(source: ModulesSource, folder: Path) -> dict[str, nn.Module]:
    """The folder's modules before they are filled."""
    with torch.random.fork_rng([]):
        loader = load_hyperpyyaml(source.hyperparams(None))["pretrainer"]
        for module in loader.late:
            module.build(folder)
    return loader.named_modules()


def load_modules(text: str, folder: Path):
    """Loads a folder by the text of its YAML; returns its loader."""
    loader = load_hyperpyyaml(text)["pretrainer"]
    loader.collect_files(default_source=str(folder))
    loader.load_collected()
    return loader
