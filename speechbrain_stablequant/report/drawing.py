"""Style and helpers of the plots; no pyplot, to leave the user's figures."""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#0072b2", "#d55e00", "#8a96a3", "#1c2733"
_STYLE = {
    "axes.edgecolor": "#b9c4cf",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.labelsize": 9,
    "font.size": 9,
    "grid.color": "#e6ebf0",
    "legend.frameon": False,
    "text.color": INK,
    # Names may contain dollar signs.
    "text.parse_math": False,
    "xtick.color": "#b9c4cf",
    "xtick.labelcolor": INK,
    "ytick.color": "#b9c4cf",
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


def to_png(
    draw: Callable[[dict], "Figure | None"], report: dict
) -> bytes | None:
    """PNG data of what ``draw`` makes of a report."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # after_reset: the user's matplotlibrc must not change the report.
    style = matplotlib.style.context(_STYLE, after_reset=True)
    with _few_log_lines(), style:
        figure = draw(report)
        if figure is None:
            return None
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        # Without matplotlib's version, the same report gives the same bytes.
        figure.savefig(
            buffer, format="png", dpi=150, metadata={"Software": None}
        )
    return buffer.getvalue()


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int, columns: int, base: float, height: float) -> list:
    """Axes of ``count`` panels, filled row by row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(10, base + height * rows)
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
