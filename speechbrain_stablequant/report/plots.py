"""The plots of a report, as PNG data.

matplotlib is imported when something is drawn and not before, and without
pyplot: the user's backend and open figures stay as they are.
"""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .build import number, percent, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY, _INK = "#0072b2", "#d55e00", "#8a96a3", "#1c2733"
_STYLE = {
    "axes.edgecolor": "#b9c4cf",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.color": "#e6ebf0",
    "legend.frameon": False,
    "text.color": _INK,
    # A dollar sign in a name is a dollar sign.
    "text.parse_math": False,
    "xtick.color": "#b9c4cf",
    "xtick.labelcolor": _INK,
    "ytick.color": "#b9c4cf",
    "ytick.labelcolor": _INK,
}
# Eight colors that color-blind people tell apart, and shapes besides.
_METHOD_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8a6d3b",
    "#1c2733",
    "#b3001e",
    "#7a5195",
)
_MARKERS = "osD^vPX*hp"
# Sizes that differ by less are one: only the activations' bits do.
_SAME_SIZE = 1.02
_DPI = 150
_MAX_HISTOGRAMS = 6
_MAX_NAME = 44
_MAX_RATIO_LABELS = 12


def draw_figures(report: dict) -> dict[str, bytes]:
    """Draws each plot that the report has data for.

    Arguments
    ---------
    report : dict
        A checked report.

    Returns
    -------
    dict[str, bytes]
        File name to PNG data; the same report gives the same bytes.
    """
    images = {}
    for name, draw in FIGURES.items():
        image = _to_png(draw, report)
        if image is not None:
            images[name] = image
    return images


def _to_png(
    draw: Callable[[dict], "Figure | None"], report: dict
) -> bytes | None:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # after_reset: a matplotlibrc of the user must not change the report
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure = draw(report)
        if figure is None:
            return None
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        # no Software entry: the version is no part of the picture
        figure.savefig(
            buffer, format="png", dpi=_DPI, metadata={"Software": None}
        )
    return buffer.getvalue()


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_sensitivity(report: dict) -> "Figure | None":
    """Bars of each unit's rise in WER, in network order from the top.

    Arguments
    ---------
    report : dict
        A checked report.

    Returns
    -------
    Figure or None
        None when no unit was measured.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    units = report["units"]
    deltas = [unit["delta_wer"] for unit in units]
    measured = [abs(delta) for delta in deltas if delta is not None]
    if not measured:
        return None
    threshold = (report.get("search") or {}).get("threshold")
    figure = _new_figure(10, 1.4 + 0.23 * len(units))
    axes = figure.add_subplot()
    colors = [_ORANGE if unit["selected"] else _BLUE for unit in units]
    rows = range(len(units))
    bars = [delta or 0 for delta in deltas]
    axes.barh(rows, bars, 0.72, color=colors)
    # One unit that ruins the model must not hide the rest: linear around
    # zero, logarithmic beyond.
    linear = max(threshold or 0, 0.1)
    if max(measured) > 15 * linear:
        axes.set_xscale("symlog", linthresh=linear, linscale=0.8)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.minorticks_off()
    axes.axvline(0, color=_GREY, linewidth=0.8)
    low, high = min(0, *bars), max(0, threshold or 0, *bars)
    # All zero is a result too, and needs an axis with some width.
    axes.set_xlim(1.08 * low, 1.08 * high or linear)
    axes.set_ylim(len(units) - 0.4, -0.6)
    axes.set_yticks(rows, [_shorten(unit["name"]) for unit in units])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    # The values stand in a column of their own, where no bar can reach.
    for row, (delta, color) in enumerate(zip(deltas, colors, strict=True)):
        axes.annotate(
            signed(delta),
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(46, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=_GREY if delta is None else color,
        )
    axes.set_xlabel("rise of the WER in points, this unit alone quantized")
    handles = [Patch(color=_ORANGE, label="selected")]
    handles.append(Patch(color=_BLUE, label="not selected"))
    if threshold is not None:
        axes.axvline(threshold, color=_INK, linewidth=1, linestyle="--")
        label = f"threshold {percent(threshold)}"
        handles.append(Line2D([], [], color=_INK, ls="--", lw=1, label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def draw_cutoffs(report: dict) -> "Figure | None":
    """WER against the cut-off ratio, a panel for each searched unit.

    Arguments
    ---------
    report : dict
        A checked report.

    Returns
    -------
    Figure or None
        None when no unit has a curve.
    """
    units = [unit for unit in report["units"] if _curve(unit)]
    if not units:
        return None
    baseline = (report.get("search") or {}).get("baseline_wer")
    # The ratios crowd towards 100, so they stand side by side, not to scale.
    ratios = sorted(
        {ratio for unit in units for ratio, _ in _curve(unit)}, reverse=True
    )
    columns = min(3, len(units))
    rows = -(-len(units) // columns)
    figure = _new_figure(10, 1.1 + 1.75 * rows)
    for index, unit in enumerate(units):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_curve(axes, unit, ratios, baseline)
        is_last_in_column = index + columns >= len(units)
        axes.tick_params(axis="x", labelbottom=is_last_in_column)
    figure.supxlabel("cut-off ratio, %", fontsize=9)
    figure.supylabel("WER on the search set, %", fontsize=9)
    if baseline is not None:
        figure.legend(handles=[axes.get_lines()[0]], loc="outside upper center")
    return figure


def _curve(unit: dict) -> list[tuple[float, float]]:
    """Cut-off and WER of every measured point, from 100 % down."""
    points = [
        (point["cutoff"], point["wer"])
        for point in unit.get("curve") or []
        if point["cutoff"] is not None and point["wer"] is not None
    ]
    return sorted(points, reverse=True)


def _draw_curve(
    axes: "Axes",
    unit: dict,
    ratios: Sequence[float],
    baseline: float | None,
) -> None:
    if baseline is not None:
        label = f"float model, {number(baseline)} %"
        axes.axhline(baseline, color=_GREY, lw=1, ls="--", label=label)
    points = _curve(unit)
    places = [ratios.index(ratio) for ratio, _ in points]
    rates = [rate for _, rate in points]
    axes.plot(places, rates, color=_BLUE, marker="o", markersize=3, lw=1.2)
    for place, (ratio, rate) in zip(places, points, strict=True):
        if ratio == unit["cutoff"]:
            axes.plot(place, rate, color=_ORANGE, marker="o", markersize=8)
    # Cut too far, a model fails altogether; the rest should stay visible.
    floor = min([*rates, baseline] if baseline is not None else rates)
    if floor > 0 and max(rates) > 5 * floor:
        _use_log_rates(axes)
    axes.margins(y=0.15)
    axes.set_xlim(-0.5, len(ratios) - 0.5)
    # On a fine grid only some ratios are labeled.
    labeled = range(0, len(ratios), -(-len(ratios) // _MAX_RATIO_LABELS))
    labels = [percent(ratios[index]) for index in labeled]
    axes.set_xticks(labeled, labels, rotation=60)
    title = f"{_shorten(unit['name'], 32)}: {percent(unit['cutoff'])} %"
    axes.set_title(title, loc="left")


def _use_log_rates(axes: "Axes") -> None:
    """A logarithmic axis with plain numbers as labels."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_histograms(report: dict) -> "Figure | None":
    """Histograms of |x| of the layers whose largest value was cut most.

    Arguments
    ---------
    report : dict
        A checked report.

    Returns
    -------
    Figure or None
        None when the report has no histograms.
    """
    layers = most_clipped(report.get("histograms") or {})
    if not layers:
        return None
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    figure = _new_figure(10, 0.6 + 2.3 * rows)
    for index, (name, entry) in enumerate(layers):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_histogram(axes, name, entry)
    figure.supxlabel("|x| at the layer's input", fontsize=9)
    figure.supylabel("values", fontsize=9)
    return figure


def most_clipped(histograms: dict) -> list[tuple[str, dict]]:
    """The layers that lose most of their range, at most six.

    Arguments
    ---------
    histograms : dict
        Layer name to histogram.

    Returns
    -------
    list[tuple[str, dict]]
        The largest max / amax first; equal ones in network order.

    Example
    -------
    >>> one = {"counts": [1], "range": 8.0, "max": 8.0, "amax": 2.0}
    >>> two = {"counts": [1], "range": 8.0, "max": 8.0, "amax": 1.0}
    >>> [name for name, _ in most_clipped({"one": one, "two": two})]
    ['two', 'one']
    """

    def lost(item: tuple[str, dict]) -> float:
        top, amax = item[1]["max"], item[1]["amax"]
        return top / amax if top and amax else 0.0

    drawable = [
        (name, entry)
        for name, entry in histograms.items()
        if entry["range"] and any(entry["counts"])
    ]
    return sorted(drawable, key=lost, reverse=True)[:_MAX_HISTOGRAMS]


def _draw_histogram(axes: "Axes", name: str, entry: dict) -> None:
    counts, top = entry["counts"], entry["range"]
    edges = [top * index / len(counts) for index in range(len(counts) + 1)]
    # Half a value is the floor of the logarithmic axis: empty bins are flat.
    heights = [max(count, 0.5) for count in counts]
    axes.stairs(heights, edges, baseline=0.5, fill=True, color="#a9cce3")
    axes.set_yscale("log")
    axes.yaxis.minorticks_off()
    axes.yaxis.set_major_formatter(
        lambda value, _: f"{value:g}" if value < 1e4 else f"{value:.0e}"
    )
    axes.set_ylim(0.5, 4 * max(counts))
    marks = (
        ("max", entry["max"], _GREY, "-", 2.5),
        ("cut-off", entry.get("cutoff_amax"), _ORANGE, "--", 1.6),
        ("amax", entry["amax"], _INK, ":", 1.6),
    )
    for what, place, color, style, width in marks:
        if place is not None:
            label = f"{what} {place:.4g}"
            axes.axvline(place, color=color, ls=style, lw=width, label=label)
    places = [place for _, place, *_ in marks if place is not None]
    axes.set_xlim(0, 1.03 * max([top, *places]))
    axes.set_title(_shorten(name, 60), loc="left")
    # Left of the largest value, which is nearly always at the right edge.
    legend = axes.legend(
        loc="upper right",
        bbox_to_anchor=(0.955, 1),
        frameon=True,
        fontsize=8,
    )
    legend.get_frame().set(edgecolor="none", alpha=0.85)


def _shorten(name: str, width: int = _MAX_NAME) -> str:
    """Cuts the middle of a long name: both of its ends tell layers apart."""
    name = " ".join(name.split())
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}\u2026{name[len(name) - (width - 1 - head) :]}"


def comparison_figures(table: dict) -> dict[str, bytes]:
    """WER against size of all variants, a picture for each test set.

    Arguments
    ---------
    table : dict
        Of ``comparison.json``, with sizes.

    Returns
    -------
    dict[str, bytes]
        File name to PNG data.
    """
    images = {}
    for name in dict.fromkeys(row["set"] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["set"] == name]
        part = {**table, "rows": rows}
        image = _to_png(draw_comparison, part)
        if image is not None:
            images[f"comparison_{name}.png"] = image
    return images


def _best_by_size(
    points: list[tuple[float, float]],
) -> list[tuple[float, float]]:
    """The lowest rate at each size, of points by rising size.

    Example
    -------
    >>> _best_by_size([(10.0, 90.0), (10.1, 36.0), (17.0, 35.0)])
    [(10.1, 36.0), (17.0, 35.0)]
    """
    best: list[tuple[float, float]] = []
    for size, rate in points:
        if best and size < best[-1][0] * _SAME_SIZE:
            if rate < best[-1][1]:
                best[-1] = (size, rate)
        else:
            best.append((size, rate))
    return best


def draw_comparison(table: dict) -> "Figure | None":
    """WER against size: a point for each variant, a line for each method
    through its best at each size.

    Arguments
    ---------
    table : dict
        Of ``comparison.json``, the rows of one test set.

    Returns
    -------
    Figure or None
        None when a size is not known.
    """
    rows = table["rows"]
    if not rows or any(row.get("size_mb") is None for row in rows):
        return None
    figure = _new_figure(10, 5)
    axes = figure.add_subplot()
    rates = [row["quantized"]["WER"] for row in rows]
    floor = rows[0]["float"]["WER"]
    label = f"float model, {number(floor)} %"
    axes.axhline(floor, color=_GREY, lw=1, ls="--", label=label)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for index, method in enumerate(methods):
        points = sorted(
            (row["size_mb"], row["quantized"]["WER"], _bits_of(row))
            for row in rows
            if row["method"] == method
        )
        color = _METHOD_COLORS[index % len(_METHOD_COLORS)]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(
            [size for size, *_ in points],
            [rate for _, rate, _ in points],
            color=color,
            marker=marker,
            markersize=5,
            lw=0,
        )
        line = _best_by_size([(size, rate) for size, rate, _ in points])
        axes.plot(
            [size for size, _ in line],
            [rate for _, rate in line],
            color=color,
            marker=marker,
            markersize=5,
            lw=1,
            label=_shorten(method),
        )
    # Points of one width lie close together: it is named once.
    for bits in dict.fromkeys(_bits_of(row) for row in rows):
        same = [row for row in rows if _bits_of(row) == bits]
        best = min(same, key=lambda row: row["quantized"]["WER"])
        axes.annotate(
            bits,
            (best["size_mb"], best["quantized"]["WER"]),
            xytext=(0, -12),
            textcoords="offset points",
            ha="center",
            color=_GREY,
        )
    if floor > 0 and max(rates) > 3 * floor:
        _use_log_rates(axes)
    axes.margins(x=0.08, y=0.12)
    float_mb = table.get("float_mb")
    beside = "" if float_mb is None else f" (float32: {number(float_mb, 1)})"
    axes.set_xlabel(f"size on disk, MB{beside}")
    axes.set_ylabel("WER, %")
    axes.set_title(_shorten(rows[0]["set"], 60), loc="left")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def _bits_of(row: dict) -> str:
    return f"W{row['weight_bits']}A{row['activation_bits']}"


# File name to drawing function, in the order of the report.
FIGURES: dict[str, Callable[[dict], "Figure | None"]] = {
    "sensitivity.png": draw_sensitivity,
    "cutoffs.png": draw_cutoffs,
    "histograms.png": draw_histograms,
}
