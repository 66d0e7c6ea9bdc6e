"""The plot of a comparison of variants: WER against size."""

from typing import TYPE_CHECKING

from .drawing import (
    GREY,
    new_figure,
    shorten,
    to_png,
    use_log_rates,
)
from .format import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colors that color-blind readers can tell apart.
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
# Sizes closer than this ratio differ only in the bits of activations.
_SAME_SIZE = 1.02


def comparison_figures(table: dict) -> dict[str, bytes]:
    """PNG data of WER against size, one plot per test set, by file name."""
    images = {}
    for name in dict.fromkeys(row["set"] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["set"] == name]
        part = {**table, "rows": rows}
        images[f"comparison_{name}.png"] = to_png(draw_comparison, part)
    return images


def draw_comparison(table: dict) -> "Figure":
    """One point per variant, one line per method through its best points."""
    rows = table["rows"]
    figure = new_figure(10, 5)
    axes = figure.add_subplot()
    rates = [row["quantized"]["WER"] for row in rows]
    floor = rows[0]["float"]["WER"]
    label = f"float model, {number(floor)} %"
    axes.axhline(floor, color=GREY, lw=1, ls="--", label=label)
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
            label=shorten(method),
        )
    # Points of the same bits lie close together: label the best one.
    for bits in dict.fromkeys(_bits_of(row) for row in rows):
        same = [row for row in rows if _bits_of(row) == bits]
        best = min(same, key=lambda row: row["quantized"]["WER"])
        axes.annotate(
            bits,
            (best["size_mb"], best["quantized"]["WER"]),
            xytext=(0, -12),
            textcoords="offset points",
            ha="center",
            color=GREY,
        )
    if floor > 0 and max(rates) > 3 * floor:
        use_log_rates(axes)
    axes.margins(x=0.08, y=0.12)
    float_mb = number(table["float_mb"], 1)
    axes.set_xlabel(f"size on disk, MB (float32: {float_mb})")
    axes.set_ylabel("WER, %")
    axes.set_title(shorten(rows[0]["set"], 60), loc="left")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def _best_by_size(
    points: list[tuple[float, float]],
) -> list[tuple[float, float]]:
    """The lowest rate at each size; ``points`` are sorted by size."""
    best: list[tuple[float, float]] = []
    for size, rate in points:
        if best and size < best[-1][0] * _SAME_SIZE:
            if rate < best[-1][1]:
                best[-1] = (size, rate)
        else:
            best.append((size, rate))
    return best


def _bits_of(row: dict) -> str:
    return f"W{row['weight_bits']}A{row['activation_bits']}"
