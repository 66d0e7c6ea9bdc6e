"""Renders a report's document as Markdown."""

import re

from .build import Bullets, Document, Figure, Table, Text

# What Markdown or the HTML within it would take for markup. An underscore
# inside a word is none, and most names have one.
_MARKUP = re.compile(r"[\\`*<>|\[\]#~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def render_markdown(document: Document) -> str:
    r"""Renders the document; plots are linked by their file names.

    Arguments
    ---------
    document : Document
        The document.

    Returns
    -------
    str
        GitHub-flavoured Markdown.

    Example
    -------
    >>> print(render_markdown(Document("A *title*", "today", [])), end="")
    # A \*title\*
    <BLANKLINE>
    today
    """
    parts = [f"# {escape(document.title)}", escape(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {escape(section.heading)}")
        parts.extend(_render(block) for block in section.blocks)
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    r"""Makes text mean itself, on one line.

    Arguments
    ---------
    text : str
        Any text.

    Returns
    -------
    str
        Markdown that shows it.

    Example
    -------
    >>> escape("ctc_lin | <b>")
    'ctc_lin \\| \\<b\\>'
    """
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
