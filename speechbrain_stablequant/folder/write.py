"""Writes the folder that ``EncoderASR.from_hparams`` loads."""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

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
from .encoder_config import CONFIG_FILE, empty_encoder
from .fill_modules import fill_modules
from .recognizer_spec import (
    HYPERPARAMS_FILE,
    RECOGNIZER_FILE,
    RecognizerSource,
    spec_of_yaml,
)
from .stored_floats import float_state, loaded_floats, stored_floats
from .weights_file import save_checkpoint
from .write_modules import ModulesSource, write_modules

logger = logging.getLogger(__name__)


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
    if source is None:
        floats = float_state(modules, integers)
        save_checkpoint(folder, plan, integers, floats, float_dtype)
        return None
    modules = {key: modules[key] for key in source.keys}
    # Parts of a plan need no description of their encoder.
    backend = "auto" if plan.parts else _backend(modules)
    if isinstance(source, ModulesSource):
        return write_modules(
            folder, modules, plan, integers, float_dtype, source, backend
        )
    floats = float_state(modules, integers)
    write_atomic(folder / CONFIG_FILE, source.config)
    write_atomic(folder / source.tokenizer_file, source.tokenizer)
    companions = [CONFIG_FILE, source.tokenizer_file]
    if _write_spec(folder, source.hyperparams("", backend)):
        companions.append(RECOGNIZER_FILE)
    probe = _make_probe(source, integers, floats, float_dtype, plan.weight_only)
    checksum = save_checkpoint(
        folder, plan, integers, floats, float_dtype, companions, probe
    )
    text = source.hyperparams(checksum, backend)
    write_atomic(folder / HYPERPARAMS_FILE, text)
    return probe


def _make_probe(
    source: RecognizerSource,
    integers: Mapping[str, IntegerLayer],
    floats: Mapping[str, torch.Tensor],
    float_dtype: str,
    weight_only: Collection[str],
) -> Probe:
    """Computes a folder's probe on the CPU from what its file holds."""
    stored = stored_floats(integers, floats, float_dtype, weight_only)
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
