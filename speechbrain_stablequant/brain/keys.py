"""The keys of the ``quantize:`` block as Markdown, from the config classes and
their docstrings."""

import difflib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from ..config import CommonConfig, MethodConfig
from ..methods.registry import METHODS, QuantizeConfig, is_below, read_by
from ..runtimes.registry import RUNTIMES
from ..utils.presets import PRESETS, with_preset
from ..utils.typed import short

_WIDTH = 80
_TITLE = "# Keys of the block `quantize:`"
_INTRO = (
    "Types and defaults as YAML has them. `stablequant keys NAME` prints those "
    "that a method reads, a preset with them, a block or one key. Presets are "
    "{}."
)


class Key(NamedTuple):
    """``path`` is dotted, ``default`` YAML; None for a block of keys."""

    path: str
    kind: str
    default: str | None
    rule: str
    meaning: str


def keys_text(name: str | None = None) -> str:
    """Markdown of all keys, of those that a method reads, of a preset with
    these, of a block or of one key.

    Raises a ValueError that says what ``name`` may be.
    """
    # As errors name keys.
    name = name and name.removeprefix("quantize.")
    if name is None or name in METHODS:
        title = _TITLE if name is None else f"{_TITLE} that `{name}` reads"
        intro = _wrapped(_INTRO.format(", ".join(sorted(PRESETS))))
        return "\n\n".join([title, intro, _blocks(read_by(name))])
    if name in PRESETS:
        text = PRESETS[name].read_text("utf-8").strip()
        title = f"# Preset `{name}`\n\n```yaml\n{text}\n```"
        return f"{title}\n\n{keys_text(_method_of(name))}"
    found = _blocks(lambda path: is_below(path, [name]), name)
    if not found:
        raise ValueError(_no_name(name))
    readers = [method for method in METHODS if read_by(method)(name)]
    if len(readers) < len(METHODS):
        found += f"\n\nRead by {', '.join(f'`{x}`' for x in readers)}."
    return found


def _method_of(preset: str) -> str:
    return with_preset({}, preset)["method"]


def _no_name(name: str) -> str:
    """That a name is none, with the closest ones."""
    paths = [key.path for _, _, keys in sections() for key in keys]
    ends = [x for x in paths if x.rpartition(".")[2] == name]
    known = [*METHODS, *PRESETS, *paths]
    close = ends or difflib.get_close_matches(name, known, n=1)
    hint = " or ".join(f"'{x}'" for x in dict.fromkeys(close))
    return (
        f"keys: {short(name)} is no method, preset, block or key (as max, "
        "stablequant_plus_mixed, search, search.threshold); "
        + (f"did you mean {hint}?" if hint else "without a name all are shown")
    )


def _blocks(takes: Callable[[str], bool], block: str | None = None) -> str:
    """Markdown of the keys of some paths, with the heading of each block; of
    ``block`` without the key itself."""
    parts = []
    for heading, about, keys in sections():
        kept = [
            key
            for key in keys
            if takes(key.path) and (key.path != block or key.kind != "block")
        ]
        if kept:
            whole = len(kept) == len(keys)
            parts += [f"## {heading}", *map(_wrapped, about if whole else [])]
            parts.append("\n".join(map(_item, kept)))
    return "\n\n".join(parts)


def sections() -> Iterator[tuple[str, list[str], list[Key]]]:
    """Heading, paragraphs and keys of each block."""
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
        if is_dataclass(hints[row.name]):
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
