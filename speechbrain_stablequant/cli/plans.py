"""Plans and reports as text, and what differs between two."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .. import QuantizationPlan
from ..report.tables import (
    is_simulated,
    number,
    share,
    signed,
    speed,
    text_columns,
)

_PLAN, _REPORT = "plan.json", "report.json"
_CLIPPING = "clipping percentile"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under a heading, as aligned lines."""
    left, made = text_columns(rows[0], rows[1:]), []
    for i, column in enumerate(zip(*rows, strict=True)):
        align = str.ljust if i in left else str.rjust
        width = max(map(len, column))
        made.append([align(cell, width) for cell in column])
    return "\n".join("  ".join(x).rstrip() for x in zip(*made, strict=True))


def load(path: Path) -> QuantizationPlan:
    """The plan of a file or a folder."""
    if path.is_dir():
        if not (path / _PLAN).exists():
            found = sorted(x.parent for x in path.glob(f"*/{_PLAN}"))
            place = " or ".join(map(str, found)) or "`quantized`"
            raise ValueError(
                f"{path}: holds no quantized recognizer; give the folder "
                f"{place} of a run, or its {_PLAN}"
            )
        path /= _PLAN
    return QuantizationPlan.load(path, with_tensors=False)


def units(plan: QuantizationPlan) -> str:
    """What was decided for each unit."""
    heads = ("unit", "layers", "bits", "alone", _CLIPPING, "cut", "searched")
    rows = [list(heads)]
    measured = {unit.name: unit for unit in plan.units}
    for name in dict.fromkeys(row.unit for row in plan.layers):
        layers = [row for row in plan.layers if row.unit == name]
        unit = measured.get(name)
        delta = unit and unit.delta_wer
        alone = "" if delta is None else signed(delta)
        bits = " ".join(sorted({row.bits for row in layers}))
        cutoffs = [row.cutoff for row in layers if _is_clipped(row)]
        ends = sorted({min(cutoffs), max(cutoffs)}) if cutoffs else []
        clipped = " to ".join(f"{x:g}" for x in ends) + " %" * bool(ends)
        searched = "yes" if unit and unit.selected else "no"
        shares = [row.beyond for row in layers if row.beyond is not None]
        cut = share(max(shares)) if shares else ""
        row = [name, str(len(layers)), bits, alone, clipped, cut, searched]
        rows.append(row)
    title = f"W{plan.weight_bits}A{plan.activation_bits} {plan.method}"
    explained = (
        "alone: points of WER with this unit alone quantized by MAX\n"
        f"{_CLIPPING}: of the inputs' sizes, at which they are cut before "
        "the scale is chosen\n"
        "cut: inputs beyond the range, of the layer that has most; a scale of "
        "least squared error cuts by itself"
    )
    lines = [title, columns(rows), explained, *_search(plan)]
    lines += [f"{x.name}: {x.executes}, {x.reason}" for x in plan.parts]
    if plan.weight_only:
        names = ", ".join(plan.weight_only)
        lines.append(f"weights alone in integers: {names}")
    return "\n".join(lines)


def layers(plan: QuantizationPlan, names: Collection[str]) -> str:
    """What was decided for layers, and why; what belongs to a unit once."""
    units = {unit.name: unit for unit in plan.units if unit.curve}
    chosen = [row for row in plan.layers if row.name in names]
    found = list(dict.fromkeys(row.unit for row in chosen))
    blocks = []
    for name in found:
        blocks += [_layer(row) for row in chosen if row.unit == name]
        if name in units:
            blocks.append("\n".join(_curve(plan, units[name])))
    if units.keys() & found:
        blocks += _search(plan)
    return "\n\n".join(blocks)


def _layer(row: Any) -> str:
    cells = [("unit", row.unit), ("bits", row.bits)]
    if _is_clipped(row):
        cells += [
            (_CLIPPING, f"{row.cutoff:g} %"),
            ("range", f"{_range(row)}, {_cut(row)}"),
            ("observed", f"at most {row.observed_max:.4g}"),
        ]
    cells.append(("because", row.reason))
    width = max(len(key) for key, _ in cells)
    lines = [f"  {key.ljust(width)}  {value}" for key, value in cells]
    return "\n".join([row.name, *lines])


def _curve(plan: QuantizationPlan, unit: Any) -> list[str]:
    """What the percentiles of a unit were compared by, and what decided."""
    by_divergence = plan.search.get("rule") == "divergence"
    loss = "divergence" if by_divergence else "loss"
    lines = [
        f"percentiles tried for {unit.name}; units searched before it are "
        "quantized as decided, the rest of the model is float:"
    ]
    for point in unit.curve:
        line = f"  {point['cutoff']:g} %: {_rates(point, loss)}"
        lines.append(line + ", chosen" * (point["cutoff"] == unit.cutoff))
    rows = {point["cutoff"]: point for point in unit.curve}
    chosen, whole = rows.get(unit.cutoff), rows.get(100.0)
    if chosen is None or whole is None or chosen is whole:
        return lines
    if chosen["wer"] is None or whole["wer"] is None:
        return lines
    points = whole["wer"] - chosen["wer"]
    why = f"not clipping costs {points:+.2f} points of WER"
    if by_divergence:
        why = f"chosen by the least divergence; {why}"
    elif points == 0:
        why = f"chosen by the lower loss: {why}"
    return [*lines, f"  {why}"]


def _rates(point: dict, loss: str) -> str:
    """The WER of a percentile, or the bound at which it was given up, and the
    loss."""
    if not point.get("complete", True):
        return f"WER at least {point['wer']:.2f}, stopped there"
    rates = [] if point["wer"] is None else [f"WER {point['wer']:.2f}"]
    if point.get("secondary") is not None:
        rates.append(f"{loss} {point['secondary']:.5g}")
    return ", ".join(rates) or "not measured"


def _search(plan: QuantizationPlan) -> list[str]:
    """What the rates of a search are to be compared with."""
    found = plan.search
    if "baseline_wer" not in found:
        return []
    line = f"float: WER {found['baseline_wer']:.2f} on the search set"
    if "num_utterances" in found:
        line += f" of {found['num_utterances']} utterances"
    if found.get("selection") == "threshold":
        line += f"; searched: units above {found['threshold']:+g} alone"
    return [line]


def _is_clipped(row: Any) -> bool:
    """Whether a layer's input is quantized, and so has a percentile."""
    return row.quant is not None and not row.quant.weight_only


def _range(row: Any) -> str:
    offset, half = row.quant.activation_offset, row.quant.activation_amax
    if offset:
        return f"{offset - half:.4g} <= input <= {offset + half:.4g}"
    return f"|input| <= {half:.4g}"


def _cut(row: Any) -> str:
    """What a layer's range cuts, whatever decided it."""
    if row.beyond:
        return f"which cuts {share(row.beyond)} of the inputs"
    if row.quant.largest < row.observed_max:
        # Of earlier plans, or so few that none was counted.
        return "which cuts the largest inputs"
    return "which cuts nothing"


# -- what differs --------------------------------------------------------------


def compared(first: Path, second: Path) -> str:
    """What differs between two folders, plans or reports."""
    blocks = []
    if _is(first, _PLAN) and _is(second, _PLAN):
        blocks.append(_compared_plans(load(first), load(second)))
    if _is(first, _REPORT) and _is(second, _REPORT):
        blocks.append(_compared_reports(_report(first), _report(second)))
    if not blocks:
        raise ValueError(
            f"{first}, {second}: give two quantized folders, two {_PLAN} or "
            f"two {_REPORT}"
        )
    return "\n\n".join(blocks)


def _is(path: Path, name: str) -> bool:
    return (path / name).is_file() or (path.is_file() and path.name == name)


def _report(path: Path) -> dict:
    if path.is_dir():
        path /= _REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {
            "title": report["title"],
            "backend": report["backend"],
            "size": report["size_mb"]["quantized"],
            "speed": "n/a" if is_simulated(report) else speed(report),
            "tests": {
                name: (row["float"]["WER"], row["quantized"]["WER"])
                for name, row in report["test"].items()
            },
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: is no report of a run; give its {_REPORT}"
        ) from error


def _compared_plans(first: QuantizationPlan, second: QuantizationPlan) -> str:
    rows = []
    ours = {row.name: row for row in first.layers}
    theirs = {row.name: row for row in second.layers}
    for name in dict.fromkeys([*ours, *theirs]):
        before, after = _described(ours, name), _described(theirs, name)
        if before != after:
            rows.append([name, before, after])
    count = f"{len(rows)} of {len(ours)} layers differ"
    if not rows:
        return count
    return f"{count}\n{columns([['layer', 'first', 'second'], *rows])}"


def _described(rows: dict, name: str) -> str:
    if name not in rows:
        return "absent"
    row = rows[name]
    if not _is_clipped(row):
        return row.bits
    return f"{row.bits} {_range(row)} ({_CLIPPING} {row.cutoff:g})"


def _compared_reports(first: dict, second: dict) -> str:
    rows = [["", "first", "second"]]
    # Times of two runs do not compare; the gain of each over float does.
    for key in ("title", "backend", "speed"):
        rows.append([key, first[key], second[key]])
    cells = [number(report["size"], 1) for report in (first, second)]
    rows.append(["size, MB", *cells])
    for name in dict.fromkeys([*first["tests"], *second["tests"]]):
        for i, model in enumerate(("float", "quantized")):
            cells = [
                number(report["tests"][name][i])
                if name in report["tests"]
                else "absent"
                for report in (first, second)
            ]
            rows.append([f"{name}, {model} WER %", *cells])
    return columns(rows)
