"""Reads a ``quantize:`` block, with the runtime and the plan that it names."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import ConfigError
from ..core.plan import QuantizationPlan
from ..methods.registry import QuantizeConfig
from ..runtimes.registry import RUNTIMES, check_options, select_options


def read_block(block: Mapping[str, Any]) -> QuantizeConfig:
    """A checked block, the options of its runtimes and its plans included."""
    config = QuantizeConfig.from_dict(block)
    variant_configs(config)
    return config


def variant_configs(config: QuantizeConfig) -> dict[str, QuantizeConfig]:
    """The config of each variant by name, with its runtime's options only.

    A variant that names another runtime than its block inherits the options
    that this runtime knows.
    """
    _check(config, "quantize")
    if not config.variants:
        return config.variant_configs()
    found = {}
    for index, (name, variant) in enumerate(config.variant_configs().items()):
        changes = config.variants[index]
        if changes.get("backend") in RUNTIMES and (
            "backend_options" not in changes
        ):
            options = select_options(variant.backend, config.backend_options)
            variant = replace(variant, backend_options=options)
        _check(variant, f"quantize.variants[{index}]")
        found[name] = variant
    return found


def run_configs(
    config: QuantizeConfig, debug: bool
) -> dict[str, QuantizeConfig]:
    """:func:`variant_configs`; a given plan's run excludes what the plan's own
    did, and debug runs accept any WER of the float model, which two batches
    have trained."""
    found = variant_configs(config)
    for name, variant in found.items():
        if variant.plan is not None:
            settings = QuantizationPlan.load(variant.plan, False).settings
            exclude = (*variant.exclude, *settings.get("exclude", ()))
            variant = replace(variant, exclude=tuple(dict.fromkeys(exclude)))
        if debug:
            search = replace(variant.search, max_float_wer=math.inf)
            variant = replace(variant, search=search)
        found[name] = variant
    return found


def _check(config: QuantizeConfig, path: str) -> None:
    known = ("auto", *RUNTIMES)
    if config.backend not in known:
        raise ConfigError(
            f"{path}.backend: '{config.backend}' is not one of "
            f"{', '.join(known)}"
        )
    try:
        check_options(config.backend, config.backend_options)
    except ValueError as error:
        raise ConfigError(f"{path}.{error}") from error
    if config.plan is not None:
        try:
            QuantizationPlan.load(config.plan, False)
        except ValueError as error:
            raise ConfigError(f"{path}.plan: {error}") from error
