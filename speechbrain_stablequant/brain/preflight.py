"""Checks and choices before long work: settings, runtime, folder, data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
from torch import nn

from ..config import ConfigError, QuantizeConfig
from ..core.encoder_spec import check_encoders
from ..core.plan import QuantizationPlan
from ..folder.write import RecognizerSource
from ..methods.search.auto_quantize import require_modelopt
from ..methods.session import check_earlier_run
from ..model.layers import find_layers
from ..runtimes.choice import choose_backend
from ..runtimes.cpu import PAIR_SUM_BITS, cpu_class
from ..runtimes.registry import RUNTIMES
from ..utils import distributed
from ..utils.files import check_writable_folder
from ..utils.typed import one_line
from .coverage import find_uncovered
from .describe import describe_recognizer
from .dry_run import check_descriptions
from .metrics import Row
from .tokenizer import Tokenizer

#: Maximum percentage of reference words that labels cannot write.
MOST_UNCOVERED = 50.0

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
    if config.needs_modelopt:
        require_modelopt()
    _check_processes(config)
    layers = find_layers(modules, config.target, config.include, config.exclude)
    if config.plan is not None:
        plan = QuantizationPlan.load(config.plan)
        kinds = {layer.name: layer.kind for layer in layers}
        plan.check_matches(kinds, config.plan)
        plan.check_tensors(layers, modules, config.plan)


def _check_processes(config: QuantizeConfig) -> None:
    """Raise if a method cannot run in several processes."""
    if distributed.size() == 1:
        return
    if config.needs_training:
        what = f"method: {config.method}"
    elif config.needs_modelopt:
        what = "plus.budget.scores: modelopt"
    else:
        return
    raise ConfigError(
        f"quantize.{what} runs in one process; start it with python instead "
        "of torchrun"
    )


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


def choose_runtime(
    brain: sb.Brain, config: QuantizeConfig
) -> tuple[str, list[str]]:
    """Choose the runtime of a variant, with warnings for the report."""
    try:
        name, reasons = choose_backend(config.backend, brain.device)
        if reasons:
            return _simulated("; ".join(r.partition(";")[0] for r in reasons))
        if RUNTIMES[name].encoder is not None:
            modules = dict(brain.modules.items())
            check_encoders({key: modules[key] for key in config.target})
    except ValueError as error:
        if config.backend != "auto":
            raise ConfigError(f"quantize.{error}") from error
        reason = str(error).partition(";")[0].removeprefix("backend: ")
        return _simulated(reason)
    return name, seven_bits_notes(name, config)


def seven_bits_notes(name: str, config: QuantizeConfig) -> list[str]:
    """Warn if a runtime executes weights with fewer bits than the plan's."""
    cpu = cpu_class()
    if (
        RUNTIMES[name].pair_sums
        and not cpu.exact
        and config.weight_bits > PAIR_SUM_BITS
    ):
        return [
            f"This CPU (class {cpu.name}) has no VNNI: weights of "
            f"{config.weight_bits} bits were executed with "
            f"{PAIR_SUM_BITS}."
        ]
    return []


def try_runtime(
    brain: sb.Brain, batch: Any, config: QuantizeConfig, backend: str
) -> tuple[str, list[str]]:
    """Try a variant's runtime on a batch; with auto, fall back to simulation.

    Returns the runtime and warnings for the report.
    """
    if RUNTIMES[backend].encoder is None:
        return backend, []
    try:
        check_descriptions(brain, batch, config)
    except ValueError as error:
        if config.backend != "auto":
            raise ConfigError(f"quantize.backend: {error}") from error
        return _simulated(str(error).partition(";")[0])
    return backend, []


def describe_folder(
    brain: sb.Brain, batch: Any, config: QuantizeConfig
) -> tuple[RecognizerSource | None, list[str]]:
    """Describe a variant's inference folder; None and why if there is none."""
    layers = find_layers(
        dict(brain.modules.items()),
        config.target,
        config.include,
        config.exclude,
    )
    try:
        names = [layer.name for layer in layers]
        return describe_recognizer(brain, batch, config, names), []
    except Exception as error:
        # A recipe without an inference folder is still evaluated.
        reason = one_line(error)
        return None, [
            f"No inference folder (EncoderASR cannot load it): {reason}."
        ]


def check_references(
    rows: Sequence[Row],
    tokenizer: Tokenizer | None,
    name: str,
    limit: float,
) -> list[str]:
    """Warn about reference words that the labels cannot write.

    Raises if most words are such, unless ``limit``, the maximum float WER, is
    100 or more.
    """
    found = None if tokenizer is None else find_uncovered(rows, tokenizer)
    if found is None:
        return []
    example = (
        f"utterance {found.id} has {found.characters!r}, which no label of the "
        "recipe's tokenizer yields"
    )
    if found.percent > MOST_UNCOVERED and limit < 100:
        raise ValueError(
            f"quantize: {name}: {example}, as {found.words} of {found.total} "
            "words do; write the "
            "transcripts as the labels are written (case, punctuation), or "
            "set quantize.search.max_float_wer to 100 or more"
        )
    return [
        f"Of the words of {name} {found.words} of {found.total} cannot be "
        f"recognized: {example}."
    ]


def _simulated(reason: str) -> tuple[str, list[str]]:
    return "torch", [f"Evaluated by simulation: {reason}."]


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
