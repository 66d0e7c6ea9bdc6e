"""Render ``report.json`` as Markdown and as one self-contained HTML file."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import tables
from .format import (
    NOT_A_SPEED_CLAIM,
    interval,
    is_simulated,
    number,
    precision,
    signed,
)

# Characters that Markdown or HTML would take for markup. Underscores inside
# words are not markup, and most names have one.
_MARKUP = re.compile(r"[\\`*<>|\[\]#~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def render_report(report: dict, figures: Mapping[str, bytes]) -> dict[str, str]:
    """Both forms of a report by file name; ``figures``: PNG data by name."""
    images = {
        name: base64.b64encode(data).decode("ascii")
        for name, data in figures.items()
    }
    markdown = _render("markdown", report, images)
    return {
        "report.md": re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n",
        "report.html": _render("html", report, images).strip() + "\n",
    }


def _render(form: str, report: dict, figures: Mapping[str, str]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=form == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = escape_markdown
    environment.globals.update(
        NOT_A_SPEED_CLAIM=NOT_A_SPEED_CLAIM,
        interval=interval,
        is_simulated=is_simulated,
        number=number,
        precision=precision,
        signed=signed,
        tables=tables,
        tone=tone,
    )
    return environment.get_template("report.jinja").render(
        report=report, figures=figures, markup=f"{form}.jinja"
    )


def tone(ends: Sequence[float] | None) -> str:
    """What a confidence interval of the WER's change supports."""
    if ends is None:
        return ""
    low, high = ends
    return "bad" if low > 0 else "good" if high < 0 else "same"


def escape_markdown(text: str) -> str:
    """Escape markup, and join lines."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
