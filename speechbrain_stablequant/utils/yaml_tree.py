"""Reads YAML as plain data; HyperPyYAML would create what its tags name."""

import re
from dataclasses import dataclass
from typing import Any

import ruamel.yaml
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from .typed import one_line, short

_PLAIN = "tag:yaml.org,2002:"
# Limits above any recognizer's file; nodes repeated by aliases count again.
_MAX_NODES = 20000
_MAX_DEPTH = 64
_MAX_TEXT = 1 << 15
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")


@dataclass(frozen=True)
class Tagged:
    """A node with a tag, such as ``new:torch.nn.Linear``, and its value."""

    tag: str
    value: Any


def parse_yaml(text: str) -> Any:
    """Returns dictionaries, lists, plain values and :class:`Tagged` ones."""
    if len(text) > _MAX_TEXT or _flow_depth(text) > _MAX_DEPTH:
        # The parser's time grows with the square of both.
        raise ValueError("its YAML is too large or nested too deeply")
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
    except (ruamel.yaml.error.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"it is not YAML ({one_line(error)})") from error
    return None if node is None else _Reader(yaml.constructor).read(node, 0)


def _flow_depth(text: str) -> int:
    """Largest number of brackets open at once."""
    depth = deepest = 0
    for sign in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if sign in "[{" else -1))
        deepest = max(deepest, depth)
    return deepest


class _Reader:
    """Converts nodes; ``scalars`` is a ruamel constructor for numbers."""

    def __init__(self, scalars: Any):
        self.scalars = scalars
        self.count = 0

    def read(self, node: Node, depth: int) -> Any:
        self.count += 1
        if self.count > _MAX_NODES or depth > _MAX_DEPTH:
            raise ValueError("its YAML is too large or nested too deeply")
        tag = str(node.tag)
        value = self._value(node, depth)
        if tag.removeprefix(_PLAIN) in _KINDS:
            return value
        return Tagged(tag.removeprefix("!"), value)

    def _value(self, node: Node, depth: int) -> Any:
        if isinstance(node, SequenceNode):
            return [self.read(item, depth + 1) for item in node.value]
        if isinstance(node, MappingNode):
            rows: dict[str, Any] = {}
            for key, value in node.value:
                name = self.read(key, depth + 1)
                if not isinstance(name, str) or name in rows:
                    raise ValueError(
                        f"its key {short(name)} is no text or is there twice"
                    )
                rows[name] = self.read(value, depth + 1)
            return rows
        return self._scalar(node)

    def _scalar(self, node: ScalarNode) -> Any:
        kind = str(node.tag).removeprefix(_PLAIN)
        if kind not in ("null", "bool", "int", "float"):
            return str(node.value)
        try:
            return self.scalars.construct_object(node)
        except (ValueError, IndexError, OverflowError) as error:
            raise ValueError(f"its value {short(node.value)}") from error
