"""Checks before long work: the Brain, the block, the folder, the checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import speechbrain as sb
from torch import nn

from ..config import ConfigError
from ..core.plan import QuantizationPlan
from ..methods.registry import QuantizeConfig
from ..methods.session import check_earlier_run
from ..model.layers import find_layers
from ..utils import distributed
from ..utils.files import check_writable_folder

# Brain options that replace the modules to be quantized.
_REPLACING = (
    "jit",
    "jit_module_keys",
    "compile",
    "compile_module_keys",
    "data_parallel_backend",
)


def check_setting(brain: sb.Brain, config: QuantizeConfig) -> Path:
    """Check what is known when a Brain is made; create the output folder.

    Rejects a Brain that is attached already or compiled, methods that need one
    process, plans that do not fit, and damaged files of an earlier run.
    """
    if hasattr(brain, "stablequant"):
        raise ValueError(
            "quantize: StableQuant is attached to this Brain already; "
            "attach it once, or use a YAML block without attach()"
        )
    for option in _REPLACING:
        if getattr(brain, option, None):
            raise ValueError(
                f"quantize: --{option} replaces modules that have to be "
                "quantized; run without it"
            )
    modules = dict(brain.modules.items())
    for variant in config.variant_configs().values():
        _check_variant(modules, variant)
    folder = check_writable_folder(
        _output_folder(brain, config), "quantize.output_folder"
    )
    check_earlier_run(folder)
    return folder


def _check_variant(
    modules: Mapping[str, nn.Module], config: QuantizeConfig
) -> None:
    if config.needs_training and distributed.size() > 1:
        raise ConfigError(
            f"quantize.method: {config.method} runs in one process; start it "
            "with python instead of torchrun"
        )
    layers = find_layers(modules, config.target, config.include, config.exclude)
    if config.plan is not None:
        plan = QuantizationPlan.load(config.plan)
        plan.check_fits(layers, modules, config.plan)


def _output_folder(brain: sb.Brain, config: QuantizeConfig) -> Path:
    if config.output_folder is not None:
        return Path(config.output_folder)
    base = getattr(brain.hparams, "output_folder", None)
    if base is None:
        raise ValueError(
            "quantize.output_folder: the recipe has no `output_folder`; "
            "name a folder here"
        )
    return Path(base) / "quantized"


def check_checkpoint(
    brain: sb.Brain, max_key: str | None, min_key: str | None
) -> None:
    """Raise if a Brain's checkpointer finds no checkpoint."""
    checkpointer = brain.checkpointer
    if checkpointer is None or brain.debug:
        return
    found = checkpointer.find_checkpoint(max_key=max_key, min_key=min_key)
    if found is None:
        raise FileNotFoundError(
            f"no checkpoint in {checkpointer.checkpoints_dir}: train "
            "first, or set quantize.require_checkpoint to false if the "
            "weights come from elsewhere"
        )
