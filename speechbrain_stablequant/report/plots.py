"""The plots of a report; no pyplot, to leave the user's figures."""

import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .tables import decisive_rate, number, percent, share, signed

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
_MAX_HISTOGRAMS = 6
_MAX_LABELS = 12


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


def draw_figures(report: dict, to: Callable) -> dict:
    """Each plot that the report has data for, by file name, as ``to_png`` or
    ``to_svg`` makes it."""
    images = {name: to(draw, report) for name, draw in FIGURES.items()}
    return {name: image for name, image in images.items() if image is not None}


def draw_sensitivity(report: dict, narrow: bool = False) -> "Figure | None":
    """Bars of each unit's rise in WER, in network order from the top."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    units = report["units"]
    deltas = [unit["delta_wer"] for unit in units]
    measured = [abs(delta) for delta in deltas if delta is not None]
    if not measured:
        return None
    threshold = report.get("search", {}).get("threshold")
    figure = new_figure(NARROW if narrow else 10, 1.4 + 0.23 * len(units))
    axes = figure.add_subplot()
    colors = [ORANGE if unit["selected"] else BLUE for unit in units]
    rows = range(len(units))
    bars = [delta or 0 for delta in deltas]
    axes.barh(rows, bars, 0.72, color=colors)
    # Linear around zero and logarithmic beyond, so that one very sensitive
    # unit does not flatten the other bars.
    linear = max(threshold or 0, 0.1)
    if max(measured) > 15 * linear:
        axes.set_xscale("symlog", linthresh=linear, linscale=0.8)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        no_minor_ticks(axes.xaxis)
    axes.axvline(0, color=GREY, linewidth=0.8)
    low, high = min(0, *bars), max(0, threshold or 0, *bars)
    # If all values are zero the axis still needs a width.
    axes.set_xlim(1.08 * low, 1.08 * high or linear)
    axes.set_ylim(len(units) - 0.4, -0.6)
    axes.set_yticks(
        rows, [shorten(unit["name"], 18 if narrow else 44) for unit in units]
    )
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    # Values are written in a column to the right of all bars.
    for row, (delta, color) in enumerate(zip(deltas, colors, strict=True)):
        axes.annotate(
            signed(delta),
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(46, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=GREY if delta is None else color,
        )
    axes.set_xlabel(
        f"rise of the {decisive_rate(report)} in points,"
        + "\n "[not narrow]
        + "this unit alone quantized"
    )
    handles = [Patch(color=ORANGE, label="selected")]
    handles.append(Patch(color=BLUE, label="not selected"))
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1, linestyle="--")
        label = f"threshold {percent(threshold)}"
        handles.append(Line2D([], [], color=INK, ls="--", lw=1, label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=3 - narrow)
    return figure


def draw_cutoffs(report: dict, narrow: bool = False) -> "Figure | None":
    """WER against the clipping percentile, one panel per searched unit."""
    units = [(unit, _curve(unit)) for unit in report["units"] if _curve(unit)]
    if not units:
        return None
    baseline = report.get("search", {}).get("baseline_wer")
    # Percentiles crowd toward 100: space them evenly, not to scale.
    percentiles = sorted({p for _, curve in units for p, _ in curve})[::-1]
    places = {percentile: i for i, percentile in enumerate(percentiles)}
    columns = 1 if narrow else 3
    grid = panels(len(units), columns, 1.1, 1.75)
    for axes, (unit, curve) in zip(grid, units, strict=True):
        _draw_curve(axes, unit, curve, places, baseline)
    # Labels below the last panel of each column.
    for axes in grid[:-columns]:
        axes.tick_params(axis="x", labelbottom=False)
    figure = grid[0].figure
    figure.supxlabel("clipping percentile, %")
    figure.supylabel(f"{decisive_rate(report)} on the search set, %")
    if baseline is not None:
        handle = grid[0].get_lines()[0]
        figure.legend(handles=[handle], loc="outside upper center")
    return figure


def _curve(unit: dict) -> list[tuple[float, float]]:
    """Clipping percentile and WER of every measured point, descending."""
    points = [
        (point["cutoff"], point["wer"])
        for point in unit.get("curve", ())
        if point["wer"] is not None
    ]
    return sorted(points, reverse=True)


def _draw_curve(
    axes: "Axes",
    unit: dict,
    curve: Sequence[tuple[float, float]],
    places: dict[float, int],
    baseline: float | None,
) -> None:
    rates = [rate for _, rate in curve]
    floor = min(rates)
    if baseline is not None:
        label = f"float model, {number(baseline)} %"
        axes.axhline(baseline, color=GREY, lw=1, ls="--", label=label)
        floor = min(floor, baseline)
    at = [places[percentile] for percentile, _ in curve]
    axes.plot(at, rates, color=BLUE, marker="o", markersize=3, lw=1.2)
    bounds = [
        (places[point["cutoff"]], point["wer"])
        for point in unit["curve"]
        if point["wer"] is not None and not point.get("complete", True)
    ]
    if bounds:
        axes.plot(*zip(*bounds, strict=True), "^", color=BLUE, markersize=5)
    chosen = dict(curve).get(unit["cutoff"])
    if chosen is not None:
        place = places[unit["cutoff"]]
        axes.plot(place, chosen, color=ORANGE, marker="o", markersize=8)
    # Strong clipping can ruin the model; keep the other points readable.
    if floor > 0 and max(rates) > 5 * floor:
        use_log_rates(axes)
    axes.margins(y=0.15)
    axes.set_xlim(-0.5, len(places) - 0.5)
    # Label only some percentiles of a fine grid.
    labeled = list(places)[:: -(-len(places) // _MAX_LABELS)]
    axes.set_xticks(
        [places[p] for p in labeled], map(percent, labeled), rotation=60
    )
    title = f"{shorten(unit['name'], 32)}: {percent(unit['cutoff'])} %"
    axes.set_title(title, loc="left")


def draw_histograms(report: dict, narrow: bool = False) -> "Figure | None":
    """Histograms of |x| of the most clipped layers."""
    layers = most_clipped(report["histograms"])
    if not layers:
        return None
    grid = panels(len(layers), 1 if narrow else 2, 0.6, 2.3)
    for axes, (name, entry) in zip(grid, layers, strict=True):
        _draw_histogram(axes, shorten(name, 40 if narrow else 60), entry)
    grid[0].figure.supxlabel("|x| at the layer's input")
    grid[0].figure.supylabel("values")
    return grid[0].figure


def most_clipped(histograms: dict) -> list[tuple[str, dict]]:
    """The clipped layers with the largest max / amax, at most six."""

    def lost(item: tuple[str, dict]) -> float:
        top, amax = item[1]["max"], item[1]["amax"]
        return top / amax if amax else 0.0

    drawable = [
        (name, entry)
        for name, entry in histograms.items()
        if entry["range"]
        and any(entry["counts"])
        and entry["max"] > entry["amax"]
    ]
    return sorted(drawable, key=lost, reverse=True)[:_MAX_HISTOGRAMS]


def _draw_histogram(axes: "Axes", title: str, entry: dict) -> None:
    counts, top = entry["counts"], entry["range"]
    edges = [top * index / len(counts) for index in range(len(counts) + 1)]
    # The logarithmic axis starts at 0.5, so that empty bins are flat.
    heights = [max(count, 0.5) for count in counts]
    axes.stairs(heights, edges, baseline=0.5, fill=True, color=FILL)
    axes.set_yscale("log")
    no_minor_ticks(axes.yaxis)
    axes.yaxis.set_major_formatter(
        lambda value, _: f"{value:g}" if value < 1e4 else f"{value:.0e}"
    )
    axes.set_ylim(0.5, 4 * max(counts))
    marks = (
        ("max", entry["max"], GREY, "-", 2.5),
        ("clipping percentile at", entry["cutoff_amax"], ORANGE, "--", 1.6),
        ("amax", entry["amax"], INK, ":", 1.6),
    )
    if entry["cutoff_amax"] >= entry["max"]:
        marks = (marks[0], marks[2])  # nothing was clipped
    for what, place, color, style, width in marks:
        label = f"{what} {place:.4g}"
        if what == "amax" and entry.get("beyond"):
            label += f" ({share(entry['beyond'])})"
        axes.axvline(place, color=color, ls=style, lw=width, label=label)
    axes.set_xlim(0, 1.03 * max(top, *(place for _, place, *_ in marks)))
    axes.set_title(title, loc="left")
    # Left of the largest value, which is usually at the right edge.
    place = {"loc": "upper right", "bbox_to_anchor": (0.955, 1)}
    legend = axes.legend(frameon=True, fontsize=8, **place)
    legend.get_frame().set(edgecolor="none", alpha=0.85)


# Drawing functions by file name, in the order of the report.
FIGURES: dict[str, Callable[..., "Figure | None"]] = {
    "sensitivity.png": draw_sensitivity,
    "cutoffs.png": draw_cutoffs,
    "histograms.png": draw_histograms,
}
