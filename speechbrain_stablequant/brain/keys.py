"""The keys of the ``quantize:`` block as Markdown, from the config classes and
their docstrings."""

import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from ..config import CommonConfig, MethodConfig
from ..methods.registry import METHODS, QuantizeConfig
from ..runtimes.registry import RUNTIMES
from ..utils.presets import PRESETS

_WIDTH = 80
_TITLE = "# Keys of the block `quantize:`"
_INTRO = (
    "Types and defaults as YAML has them. `stablequant keys METHOD` prints the "
    "keys of one method. Presets are {}."
)


class Key(NamedTuple):
    """``path`` is dotted, ``default`` YAML; None for a block of keys."""

    path: str
    kind: str
    default: str | None
    rule: str
    meaning: str


def keys_text(method: str | None = None) -> str:
    """Markdown of all keys, or of those that a method may use."""
    wanted = None
    if method is not None:
        config = METHODS[method].config
        wanted = {config.block, *config.also_reads}
    intro = _INTRO.format(", ".join(sorted(PRESETS)))
    parts = [_TITLE, _wrapped(intro)]
    for heading, about, keys in sections(wanted):
        parts += [f"## {heading}", *map(_wrapped, about)]
        parts.append("\n".join(map(_item, keys)))
    return "\n\n".join(parts)


def sections(
    wanted: set[str] | None = None,
) -> Iterator[tuple[str, list[str], list[Key]]]:
    """Heading, paragraphs and keys of each block; ``wanted`` are the blocks of
    methods to take."""
    about, documented = _docstring(CommonConfig)
    documented |= _docstring(QuantizeConfig)[1]
    hints = get_type_hints(QuantizeConfig)
    methods = [
        name
        for name, hint in hints.items()
        if is_dataclass(hint) and issubclass(hint, MethodConfig)
    ]
    common = [x for x in fields(QuantizeConfig) if x.name not in methods]
    keys = [_key(x, "", hints, documented) for x in common]
    yield "All methods", about, keys
    for row in fields(QuantizeConfig):
        kept = row.name not in methods or wanted is None or row.name in wanted
        if is_dataclass(hints[row.name]) and kept:
            yield from _of_block(hints[row.name], row.name)
    for name, runtime in RUNTIMES.items():
        if fields(runtime.options):
            (block,) = _of_block(runtime.options, "backend_options")
            yield f"`backend_options` of `{name}`", [], block[2]


def _of_block(
    kind: type, path: str
) -> Iterator[tuple[str, list[str], list[Key]]]:
    """Sections of a block's class, and of the blocks in it."""
    about, documented = _docstring(kind)
    hints = get_type_hints(kind)
    keys = [_key(x, f"{path}.", hints, documented) for x in fields(kind)]
    yield f"`{path}`", about, keys
    for row in fields(kind):
        if is_dataclass(hints[row.name]):
            yield from _of_block(hints[row.name], f"{path}.{row.name}")


def _key(
    row: Field,
    prefix: str,
    hints: dict[str, Any],
    documented: dict[str, tuple[str, str]],
) -> Key:
    kind, meaning = documented[row.name]
    path = f"{prefix}{row.name}"
    if is_dataclass(hints[row.name]):
        return Key(path, "block", None, "", meaning)
    kind = kind.replace("tuple", "list").replace("dict", "block")
    made = row.default if row.default is not MISSING else row.default_factory()
    default = made if isinstance(made, str) else json.dumps(made)
    return Key(path, kind, default, row.metadata.get("rule", ""), meaning)


def _docstring(kind: type) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """Paragraphs of a class's docstring, and type and meaning of arguments."""
    text = re.sub(r"\bNone\b", "null", inspect.getdoc(kind))
    text = text.replace("``", "`")
    about, _, arguments = text.partition("\n\nArguments\n---------\n")
    # The place, which is the heading.
    about = re.sub(r"^`[\w.]+`: (\w)", lambda x: x[1].upper(), about)
    pattern = r"^(\w+(?:, \w+)*) : (.+)\n((?:    .*(?:\n|$))+)"
    found = {}
    for names, type_, meaning in re.findall(pattern, arguments, re.MULTILINE):
        for name in names.split(", "):
            found[name] = (type_, " ".join(meaning.split()))
    return [" ".join(x.split()) for x in about.split("\n\n")], found


def _item(key: Key) -> str:
    default = f", default `{key.default}`" if key.default is not None else ""
    rule = f"; {key.rule}" if key.rule else ""
    text = f"- `{key.path}` ({key.kind}{default}{rule}): {key.meaning}"
    return _wrapped(text, "  ")


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
