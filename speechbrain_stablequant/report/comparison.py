"""The comparison of variants: ``comparison.json``, its table and its plots."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.files import write_atomic, write_json
from .plots import GREY, new_figure, shorten, to_png, use_log_rates
from .results import Effort, Execution, SetResult, real_time_factors, speedup
from .tables import interval, number, signed, speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colors that color-blind readers can tell apart.
_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#8a6d3b", "#1c2733", "#b3001e", "#7a5195"),
)
_MARKERS = "osD^vPX*hp"
# Sizes closer than this ratio differ only in the bits of activations.
_SAME_SIZE = 1.02
# Columns that stand to the left.
_WORDS = ("set", "variant", "speed", "utterances used")


def variant_rows(
    name: str,
    how: tuple[str, int, int],
    results: Mapping[str, SetResult],
    execution: Execution,
    effort: Effort | None = None,
    operations: Mapping[str, int] | None = None,
) -> list[dict]:
    """Rows of ``comparison.json`` for one variant, one for each test set.

    ``how``: method, bits of weights and of activations; ``operations``: counts
    of ``integer`` and ``float`` matrix products, where no plan says them.
    """
    method, weight_bits, activation_bits = how
    rows = []
    for set_name, result in results.items():
        row = {
            "variant": name,
            "method": method,
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "set": set_name,
            **result.to_dict(),
            "size_mb": execution.size / 1e6,
            "backend": execution.backend,
            "simulated": execution.simulated,
            "rtf": real_time_factors([result]),
            "speedup": speedup([result]),
        }
        if operations is not None:
            row["operations"] = dict(operations)
        if effort is not None:
            row["effort"] = asdict(effort)
        rows.append(row)
    return rows


def write_comparison(table: dict, folder: Path) -> None:
    """Write and print ``{"rows": [...], "float_mb": ...}`` with its plots."""
    write_json(folder / "comparison.json", table)
    for name, image in comparison_figures(table).items():
        write_atomic(folder / name, image)
    text = comparison_markdown(table)
    path = write_atomic(folder / "comparison.md", text)
    print(text)
    print(f"comparison: {path}", flush=True)


def comparison_markdown(table: Mapping) -> str:
    rows = table["rows"]
    optional: dict[str, Callable[[Mapping], str]] = {}
    if any("operations" in row for row in rows):
        optional["float products"] = _products
    if any("effort" in row for row in rows):
        optional["made in"] = _seconds
        optional["utterances used"] = _data
    rate = rows[0].get("rate", "WER")
    columns = ["set", "variant", f"{rate} %", "change", "95 % interval"]
    # Variants are timed one after the other, so their times do not compare;
    # the gain of each is measured in turns with the float model.
    columns += ["CER %", "change", "MB", "speed", *optional]
    sides = ["---" if name in _WORDS else "---:" for name in columns]
    lines, seen = [columns, sides], set()
    for row in rows:
        if row["set"] not in seen:
            seen.add(row["set"])
            rates = row["float"]
            cells = [row["set"], "float", number(rates["WER"]), "", ""]
            cells += [number(rates["CER"]), "", number(table["float_mb"], 1)]
            lines.append([*cells, *[""] * (1 + len(optional))])
        cells = [cell(row) for cell in optional.values()]
        lines.append([*_figures(row), *cells])
    if rate != "WER":
        # Characters of phonemes have no meaning.
        lines = [line[:5] + line[7:] for line in lines]
    return "".join(f"{_line(line)}\n" for line in lines)


def _line(cells: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _figures(row: Mapping) -> list[str]:
    rates = row["quantized"]
    return [
        row["set"],
        row["variant"],
        number(rates["WER"]),
        signed(row["delta_wer"]),
        interval(row["delta_wer_ci"]),
        number(rates["CER"]),
        signed(row["delta_cer"]),
        number(row["size_mb"], 1),
        # That of a simulation says nothing about integers.
        "" if row["simulated"] else speed(row),
    ]


def _products(row: Mapping) -> str:
    count = row.get("operations")
    return f"{count['float']} of {sum(count.values())}" if count else ""


def _seconds(row: Mapping) -> str:
    return f"{row['effort']['seconds']:.0f} s" if "effort" in row else ""


def _data(row: Mapping) -> str:
    """The data used, in words: ``search 12 with transcripts``."""
    effort = row.get("effort", {"utterances": {}})
    return ", ".join(
        f"{name} {count}"
        + (" with transcripts" if name in effort["transcribed"] else "")
        for name, count in effort["utterances"].items()
    )


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
        color = _COLORS[index % len(_COLORS)]
        marker = _MARKERS[index % len(_MARKERS)]
        style = {"color": color, "marker": marker, "markersize": 5}
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
    axes.set_ylabel(f"{rows[0].get('rate', 'WER')}, %")
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
