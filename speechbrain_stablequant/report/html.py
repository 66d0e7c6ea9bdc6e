"""Render a report's document as one self-contained HTML file."""

import base64
from collections.abc import Mapping
from html import escape

from .blocks import Bullets, Document, Figure, Table, Text

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: #1c2733;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; }
h2 { margin: 0 0 12px; font-size: 18px; }
h1, h2, p, td, li { overflow-wrap: break-word; }
header p { margin: 4px 0 20px; color: #586675; }
section { margin: 0 0 18px; padding: 18px 22px; background: #fff;
  border: 1px solid #dde3e9; border-radius: 8px; }
section > :last-child { margin-bottom: 0; }
p, ul, figure, .table { margin: 0 0 14px; }
ul { padding-left: 20px; }
.good, .same, .bad { padding: 8px 12px; border-left: 4px solid; }
.good { border-color: #00805e; background: #eaf6f2; }
.same { border-color: #0072b2; background: #eaf3f9; }
.bad { border-color: #c24a00; background: #fcf0e8; }
.table { overflow-x: auto; }
table { border-collapse: collapse; min-width: 50%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; text-align: right; vertical-align: top;
  border-bottom: 1px solid #e6ebf0; }
th { color: #586675; font-size: 13px; font-weight: 600;
  vertical-align: bottom; border-bottom-color: #b9c4cf; }
th:first-child, td:first-child { text-align: left; padding-left: 4px; }
td:not(:first-child) { white-space: nowrap; }
td.long { white-space: normal; }
tr.on td { background: #fdf3ec; }
tr.on td:first-child { font-weight: 600; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: #586675; font-size: 13px; text-align: center; }
"""

# Cells with more characters may wrap, to keep tables within the page.
_LONG_CELL = 32


def render_html(document: Document, images: Mapping[str, bytes]) -> str:
    """Render the document with ``images``, the PNG data of its plots."""
    sections = []
    for section in document.sections:
        blocks = [_render(block, images) for block in section.blocks]
        heading = f"<h2>{escape(section.heading)}</h2>"
        sections.append(
            "\n".join(["<section>", heading, *blocks, "</section>"])
        )
    # The policy blocks loading and running anything, whatever a name holds.
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src '
            "'none'; img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(document.title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            "<header>",
            f"<h1>{escape(document.title)}</h1>",
            f"<p>{escape(document.subtitle)}</p>",
            "</header>",
            *sections,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _render(
    block: Text | Bullets | Table | Figure, images: Mapping[str, bytes]
) -> str:
    match block:
        case Text():
            tone = "" if block.tone == "plain" else f' class="{block.tone}"'
            return f"<p{tone}>{escape(block.text)}</p>"
        case Bullets():
            items = "".join(f"<li>{escape(item)}</li>" for item in block.items)
            return f"<ul>{items}</ul>"
        case Table():
            return _render_table(block)
        case Figure():
            data = base64.b64encode(images[block.file]).decode("ascii")
            caption = escape(block.caption)
            return (
                f'<figure><img src="data:image/png;base64,{data}" '
                f'alt="{caption}"><figcaption>{caption}</figcaption></figure>'
            )
    raise TypeError(f"no HTML for a {type(block).__name__}")


def _render_table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = []
    for index, row in enumerate(table.rows):
        mark = ' class="on"' if index in table.highlighted else ""
        rows.append(f"<tr{mark}>{''.join(map(_render_cell, row))}</tr>")
    body = "\n".join(rows)
    return (
        f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _render_cell(text: str) -> str:
    kind = ' class="long"' if len(text) > _LONG_CELL else ""
    return f"<td{kind}>{escape(text)}</td>"
