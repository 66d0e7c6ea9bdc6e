"""The report of a quantization run.

``report.json`` is the only source of the Markdown, the HTML and the plots.
"""

from pathlib import Path

from ..utils.files import write_atomic, write_json
from .plots import FIGURES, draw_figures
from .render import render_report
from .summary import summary_table

__all__ = ["summary_table", "write_report"]


def write_report(report: dict, folder: str | Path) -> list[Path]:
    """Write ``report.json``, ``.md``, ``.html`` and the plots that apply.

    Plots of an earlier run that this report has no data for are removed.

    Arguments
    ---------
    report : dict
        From :func:`~speechbrain_stablequant.report.build.build_report`.
    folder : str or Path
        Created if it does not exist.

    Returns
    -------
    list[Path]
        The files that were written, ``report.json`` first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The numbers come first: if a plot fails, they are safe.
    written = [write_json(folder / "report.json", report)]
    figures = draw_figures(report)
    for name, image in figures.items():
        written.append(write_atomic(folder / name, image))
    for name in FIGURES:
        if name not in figures:
            (folder / name).unlink(missing_ok=True)
    for name, text in render_report(report, figures).items():
        written.append(write_atomic(folder / name, text))
    return written
