"""Writes a report: JSON, plots, Markdown, and one self-contained HTML file."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..folder.card import Origin, card_header
from ..utils.files import write_atomic, write_json
from . import tables, utterances
from .plots import FIGURES, draw_figures, to_png, to_svg

# Characters that Markdown or HTML would take for markup. Underscores inside
# words are not markup, and most names have one.
_MARKUP = re.compile(r"[\\`*<>|\[\]#~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def write_report(report: dict, folder: Path) -> list[Path]:
    """Writes all files, the JSON first; removes plots of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    # The numbers come first: if a plot fails, they are safe.
    written = [write_json(folder / "report.json", report)]
    figures = draw_figures(report, to_png)
    for name, image in figures.items():
        written.append(write_atomic(folder / name, image))
    for name in FIGURES:
        if name not in figures:
            (folder / name).unlink(missing_ok=True)
    drawn = {"markdown": figures, "html": draw_figures(report, to_svg)}
    markdown, html = (
        render(form, "report.jinja", report, figures=drawn[form])
        for form in drawn
    )
    for name, text in {"report.md": markdown, "report.html": html}.items():
        written.append(write_atomic(folder / name, text))
    return written


def render_card(
    report: dict, origin: Origin, interface: str, as_data: bool
) -> str:
    """The model card of a report's model.

    ``interface`` is SpeechBrain's class for it; ``as_data``: whether
    ``speechbrain_stablequant.load`` takes it too.
    """
    own = report.get("model", {}).get("name") or "Speech recognizer"
    name = (origin.base_model or own).rpartition("/")[2]
    title = f"{name}, {report['title']}"
    rate = tables.decisive_rate(report)
    return card_header(
        title, origin, rate, report["test"], report["bits"]
    ) + render(
        "markdown",
        "card.jinja",
        report,
        title=title,
        origin=origin,
        interface=interface,
        as_data=as_data,
    )


def render(form: str, template: str, report: dict, **more: Any) -> str:
    """A report in ``markdown`` or ``html``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=form == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = escape_markdown
    environment.globals.update(tables=tables, utterances=utterances)
    text = environment.get_template(template).render(
        report=report, markup=f"{form}.jinja", **more
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escape_markdown(text: str) -> str:
    """Escape markup, and join lines."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
