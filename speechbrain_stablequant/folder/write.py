"""Writes the folders that SpeechBrain's classes load."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hyperpyyaml import load_hyperpyyaml
from torch import nn

from ..core.encoder_spec import check_encoders
from ..core.integer_layer import IntegerLayer
from ..core.plan import QuantizationPlan
from ..model.wrapper import StoredEncoder
from ..runtimes.probe import Probe
from ..runtimes.probe_make import simulated_probe
from ..utils.files import write_atomic, write_json
from ..utils.typed import one_line
from .encoder_config import empty_encoder
from .module_state import (
    COMPUTED,
    computed_buffers,
    hidden_state,
    training_buffers,
)
from .recognizer_spec import (
    HEAD,
    HYPERPARAMS_FILE,
    RECOGNIZER_FILE,
    RecognizerSource,
    spec_of_yaml,
)
from .stored_floats import (
    fill_modules,
    float_state,
    loaded_floats,
    stored_floats,
)
from .weights_file import save_checkpoint

logger = logging.getLogger(__name__)

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
        head = HEAD.format(interface=self.interface, backend=backend)
        return f"{head}{self.text.rstrip()}\n{loader}"


def write_folder(
    folder: str | Path,
    modules: Mapping[str, nn.Module],
    plan: QuantizationPlan,
    integers: Mapping[str, IntegerLayer],
    float_dtype: str,
    source: RecognizerSource | ModulesSource | None,
) -> Probe | None:
    """Writes a quantized model into an existing folder, and what loads it.

    Returns the probe that runtimes have to pass. Without a source only the
    weights and the plan are written.
    """
    folder = Path(folder)
    # Files of an earlier run would describe another model.
    for name in (HYPERPARAMS_FILE, RECOGNIZER_FILE):
        (folder / name).unlink(missing_ok=True)
    if source is not None:
        modules = {key: modules[key] for key in source.keys}
    floats = float_state(modules, integers)
    if source is None:
        save_checkpoint(folder, plan, integers, floats, float_dtype)
        return None
    for name, content in source.files.items():
        write_atomic(folder / name, content)
    # Parts of a plan need no description of their encoder.
    backend = "auto" if plan.parts else _backend(modules)
    companions = list(source.files)
    if isinstance(source, ModulesSource):
        floats = _file_floats(folder, modules, floats, float_dtype, source)
        save = [folder, plan, integers, floats, float_dtype, companions]
        checksum = save_checkpoint(*save)
        with torch.random.fork_rng([]):
            loader = load_hyperpyyaml(source.hyperparams(checksum))[
                "pretrainer"
            ]
            loader.collect_files(default_source=str(folder))
            loader.load_collected()
        probe = loader.live.make_probe(source.sample_rate)
    else:
        if _write_spec(folder, source.hyperparams("", backend)):
            companions.append(RECOGNIZER_FILE)
        save = [folder, plan, integers, floats, float_dtype, companions]
        stored = stored_floats(integers, floats, float_dtype, plan.weight_only)
        probe = _make_probe(source, integers, stored)
    checksum = save_checkpoint(*save, probe)
    text = source.hyperparams(checksum, backend)
    write_atomic(folder / HYPERPARAMS_FILE, text)
    return probe


def _make_probe(
    source: RecognizerSource,
    integers: Mapping[str, IntegerLayer],
    stored: Mapping[str, torch.Tensor],
) -> Probe:
    """Computes a folder's probe on the CPU from what its file holds."""
    state = loaded_floats(stored, stored.__getitem__)
    settings = dict(source.encoder)
    key, use_lengths = settings.pop("key"), settings.pop("use_lengths")
    # Building modules draws random numbers.
    with torch.random.fork_rng([]):
        encoder = empty_encoder(json.loads(source.config))
        parts = {key: StoredEncoder(encoder, **settings)}
        for name, text in source.heads.items():
            parts[name] = load_hyperpyyaml(text)[name]
    fill_modules(parts, integers, state, "the quantized model")
    for part in parts.values():
        part.cpu().eval()
    return simulated_probe(parts, integers, use_lengths, source.sample_rate)


def _write_spec(folder: Path, hyperparams: str) -> bool:
    """Writes ``recognizer.json`` if the heads can be described as data."""
    try:
        spec = spec_of_yaml(hyperparams)
        spec.build_heads()
    except ValueError as error:
        logger.warning(
            "quantize: speechbrain_stablequant.load will not load this folder, "
            "EncoderASR does: %s",
            one_line(error, 400),
        )
        return False
    write_json(folder / RECOGNIZER_FILE, spec.to_dict())
    return True


def _backend(modules: Mapping[str, nn.Module]) -> str:
    """Returns ``auto``; ``torch`` if no other runtime knows the encoder."""
    try:
        check_encoders(modules)
    except ValueError:
        return "torch"
    return "auto"


def _file_floats(
    folder: Path,
    modules: Mapping[str, nn.Module],
    floats: Mapping[str, torch.Tensor],
    float_dtype: str,
    source: ModulesSource,
) -> dict[str, torch.Tensor]:
    """What a file holds: no buffers that newly made modules have or that only
    training needs, and state that is in no state dict."""
    made = made_objects(source, folder)["pretrainer"].named_modules()
    computed = computed_buffers(modules, made, float_dtype)
    left_out = training_buffers(modules).keys() | computed.keys()
    return {
        **{name: x for name, x in floats.items() if name not in left_out},
        **{COMPUTED + k: x for k, x in computed.items() if k in floats},
        **hidden_state(modules),
    }


def made_objects(source: ModulesSource, folder: Path) -> dict[str, Any]:
    """The objects of a folder's YAML, its modules not filled yet."""
    with torch.random.fork_rng([]):
        hparams = load_hyperpyyaml(source.hyperparams(None))
        for module in hparams["pretrainer"].late:
            module.build(folder)
    return hparams
