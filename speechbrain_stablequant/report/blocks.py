"""A document without markup, which ``markdown.py`` and ``html.py`` render."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Text:
    """A paragraph; the tone selects its color in HTML."""

    text: str
    tone: Literal["plain", "good", "same", "bad"] = "plain"


@dataclass(frozen=True)
class Bullets:
    """A list of short statements."""

    items: list[str]


@dataclass(frozen=True)
class Table:
    """Columns and rows of text. The first column is text, the rest numbers."""

    columns: list[str]
    rows: list[list[str]]
    highlighted: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Figure:
    """A plot, by the name of its file."""

    file: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with the blocks below it."""

    heading: str
    blocks: list[Text | Bullets | Table | Figure]


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    subtitle: str
    sections: list[Section]
