"""Style and helpers of the plots; no pyplot, to leave the user's figures."""

import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#0072b2", "#d55e00", "#8a96a3", "#1c2733"
FILL, _EDGE, _GRID = "#a9cce3", "#b9c4cf", "#e6ebf0"
#: Inches of a figure, on a page and on a phone.
WIDE, NARROW = 10, 4
#: What follows the page's colors in SVG: its variables by our colors.
_VARIABLES = {
    **{BLUE: "blue", ORANGE: "orange", GREY: "dim", INK: "ink", FILL: "fill"},
    **{_EDGE: "edge", _GRID: "rule", "#ffffff": "card"},
}
_STYLE = {
    "axes.edgecolor": _EDGE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.labelsize": 9,
    "font.size": 9,
    "grid.color": _GRID,
    "legend.frameon": False,
    "text.color": INK,
    # Names may contain dollar signs.
    "text.parse_math": False,
    "xtick.color": _EDGE,
    "xtick.labelcolor": INK,
    "ytick.color": _EDGE,
    "ytick.labelcolor": INK,
}


@contextmanager
def _few_log_lines() -> Iterator[None]:
    """Keeps matplotlib's many lines about fonts out of a recipe's log."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(max(logger.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        logger.setLevel(level)


def to_png(draw: Callable[..., "Figure | None"], report: dict) -> bytes | None:
    """PNG data of what ``draw`` makes of a report."""
    # Without matplotlib's version, the same report gives the same bytes.
    return _saved(draw, [report], {}, format="png", metadata={"Software": None})


def to_svg(draw: Callable[..., "Figure | None"], report: dict) -> str | None:
    """Elements of a page that show a plot on wide and on narrow screens."""
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    found = ""
    for name in ("wide", "narrow"):
        style = {"svg.fonttype": "none", "svg.hashsalt": draw.__name__ + name}
        data = _saved(
            draw,
            [report, name == "narrow"],
            style,
            format="svg",
            metadata=nothing,
            transparent=True,
        )
        if data is None:
            return None
        text = data.decode("utf-8")
        text = text[text.index("<svg") :].replace("xlink:href", "href")
        text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
        for color, variable in _VARIABLES.items():
            text = text.replace(color, f"var(--{variable})")
        found += f'<div class="{name}">{text}</div>'
    return found


def _saved(
    draw: Callable[..., "Figure | None"],
    arguments: list,
    style: dict,
    **options: Any,
) -> bytes | None:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # after_reset: the user's matplotlibrc must not change the report.
    style = matplotlib.style.context({**_STYLE, **style}, after_reset=True)
    with _few_log_lines(), style:
        figure = draw(*arguments)
        if figure is None:
            return None
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150, **options)
    return buffer.getvalue()


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int, columns: int, base: float, height: float) -> list:
    """Axes of ``count`` panels, filled row by row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    width = NARROW if columns == 1 else WIDE
    figure = new_figure(width, base + height * rows)
    return [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def no_minor_ticks(axis: "Axis") -> None:
    """``axis.minorticks_off()``, which matplotlib has from 3.9 on."""
    from matplotlib.ticker import NullLocator

    axis.set_minor_locator(NullLocator())


def use_log_rates(axes: "Axes") -> None:
    """Make the y axis logarithmic, with plain numbers as labels."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    no_minor_ticks(axes.yaxis)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def shorten(name: str, width: int = 44) -> str:
    """Cut the middle of a long name; layer names differ at both ends."""
    name = " ".join(name.split())
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}\u2026{name[len(name) - (width - 1 - head) :]}"
