"""The report of a quantization run.

``report.json`` is the one source. The Markdown, the HTML and the plots are
made from it and state nothing else.
"""

from pathlib import Path

from ..utils.files import write_atomic, write_json
from .build import build_document
from .html import render_html
from .markdown import render_markdown
from .plots import FIGURES, comparison_figures, draw_figures
from .schema import check_report
from .summary import summary_table

__all__ = [
    "check_report",
    "comparison_figures",
    "summary_table",
    "write_report",
]


def write_report(report: dict, folder: str | Path) -> list[Path]:
    """Writes ``report.json``, ``.md``, ``.html`` and the plots that apply.

    A plot that an earlier run left in the folder and that this report has no
    data for is removed, so that the folder tells one story.

    Arguments
    ---------
    report : dict
        What was measured; see ``schema.py`` for the keys.
    folder : str or Path
        Where to write. Is created if need be.

    Returns
    -------
    list[Path]
        The files that were written, ``report.json`` first.
    """
    check_report(report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The numbers come first: should a plot fail, they are safe.
    written = [write_json(folder / "report.json", report)]
    figures = draw_figures(report)
    document = build_document(report, list(figures))
    for name, image in figures.items():
        written.append(write_atomic(folder / name, image))
    for name in FIGURES:
        if name not in figures:
            (folder / name).unlink(missing_ok=True)
    texts = {
        "report.md": render_markdown(document),
        "report.html": render_html(document, figures),
    }
    for name, text in texts.items():
        written.append(write_atomic(folder / name, text))
    return written
