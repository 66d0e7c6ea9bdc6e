"""Presets: the blocks in ``hparams/``, which the package has as its data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .typed import short, unknown_name
from .yaml_tree import parse_yaml

#: A block for each method, by the name that ``preset`` takes.
PRESETS = {
    path.stem: path for path in Path(__file__).parents[1].glob("hparams/*.yaml")
}


def with_preset(block: dict[str, Any], name: Any) -> dict[str, Any]:
    """The keys of a preset, without ``target``; a block's own come first."""
    if name not in PRESETS:
        known = unknown_name(name, sorted(PRESETS))
        raise ValueError(f"quantize.preset: {known}")
    preset = parse_yaml(PRESETS[name].read_text("utf-8"))["quantize"].value
    del preset["target"]
    if block.get("method", preset["method"]) != preset["method"]:
        raise ValueError(
            f"quantize.preset: {name} is of method {preset['method']}, not "
            f"{short(block['method'])}; leave out preset or method"
        )
    return merged(preset, block)


def merged(base: Mapping, changes: Mapping) -> dict[str, Any]:
    """A copy of ``base`` with some keys changed, sub-blocks key by key."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        result[key] = merged(base[key], value) if both else value
    return result
