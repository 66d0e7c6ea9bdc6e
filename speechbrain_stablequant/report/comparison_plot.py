"""The plot of a comparison of variants: WER against size."""

from typing import TYPE_CHECKING

from .drawing import GREY, new_figure, shorten, to_png, use_log_rates
from .format import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colors that color-blind readers can tell apart.
_COLORS = [
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
]
_MARKERS = "osD^vPX*hp"
# Sizes closer than this ratio differ only in the bits of activations.
_SAME_SIZE = 1.02


def comparison_figures(table: dict) -> dict[str, bytes]:
    """PNG data of WER against size, one plot per test set, by file name."""
    images = {}
    for name in dict.fromkeys(row["set"] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["set"] == name]
        images[f"comparison_{name}.png"] = to_png(
            draw_comparison, {**table, "rows": rows}
        )
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
    for index, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
        points = sorted(_point(row) for row in rows if row["method"] == method)
        style = {
            "color": _COLORS[index % len(_COLORS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 5,
        }
        axes.plot(*zip(*points, strict=True), lw=0, **style)
        line = zip(*_best_by_size(points), strict=True)
        axes.plot(*line, lw=1, label=shorten(method), **style)
    # Points of the same bits lie close together: label the best one.
    for bits in dict.fromkeys(_bits_of(row) for row in rows):
        same = [row for row in rows if _bits_of(row) == bits]
        axes.annotate(
            bits,
            _point(min(same, key=lambda row: row["quantized"]["WER"])),
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


def _point(row: dict) -> tuple[float, float]:
    return row["size_mb"], row["quantized"]["WER"]


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
