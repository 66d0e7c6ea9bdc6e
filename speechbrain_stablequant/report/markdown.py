"""Render a report's document as GitHub-flavored Markdown."""

import re

from .blocks import Bullets, Document, Figure, Table, Text

# Characters that Markdown or HTML would take for markup. Underscores inside
# words are not markup, and most names have one.
_MARKUP = re.compile(r"[\\`*<>|\[\]#~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def render_markdown(document: Document) -> str:
    """Render the document; plots are linked by their file names."""
    parts = [f"# {escape(document.title)}", escape(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {escape(section.heading)}")
        parts.extend(_render(block) for block in section.blocks)
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Escape markup, and join lines."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def _render(block: Text | Bullets | Table | Figure) -> str:
    match block:
        case Text():
            return escape(block.text)
        case Bullets():
            return "\n".join(f"- {escape(item)}" for item in block.items)
        case Table():
            return _render_table(block)
        case Figure():
            return f"![{escape(block.caption)}]({block.file})"
    raise TypeError(f"no Markdown for a {type(block).__name__}")


def _render_table(table: Table) -> str:
    rule = ["---"] + ["---:"] * (len(table.columns) - 1)
    rows = [list(map(escape, row)) for row in [table.columns, *table.rows]]
    rows.insert(1, rule)
    for index in table.highlighted:
        rows[index + 2][0] = f"**{rows[index + 2][0]}**"
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
