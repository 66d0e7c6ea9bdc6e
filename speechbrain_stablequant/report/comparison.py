"""The comparison of variants: ``comparison.json``, its table and its plots."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..utils.files import write_atomic, write_json
from .comparison_plot import comparison_figures
from .results import Effort, Execution, SetResult, real_time_factors


def variant_rows(
    name: str,
    how: tuple[str, int, int],
    results: Mapping[str, SetResult],
    execution: Execution,
    effort: Effort | None = None,
    operations: Mapping[str, int] | None = None,
) -> list[dict]:
    """Rows of ``comparison.json`` for one variant, one for each test set.

    Arguments
    ---------
    name : str
        The variant's name.
    how : tuple
        Method, bits of weights and bits of activations.
    results : Mapping
        Both evaluations by test set.
    execution : Execution
        What was evaluated, and its size on disk.
    effort : Effort, optional
        What the plan took.
    operations : Mapping, optional
        Counts of ``integer`` and ``float`` matrix products, where no plan says
        them.

    Returns
    -------
    list of dict
        Rates in percent.
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
    """Render the comparison as a Markdown table."""
    columns = ["set", "variant", "WER %", "change", "95 % interval"]
    columns += ["CER %", "change", "MB", "RTF"]
    if any("operations" in row for row in table["rows"]):
        columns.append("float products")
    if any("effort" in row for row in table["rows"]):
        columns += ["made in", "utterances used"]
    lines = [_line(columns), "|" + "---|" * len(columns)]
    seen = set()
    for row in table["rows"]:
        if row["set"] not in seen:
            seen.add(row["set"])
            rates = row["float"]
            cells = [row["set"], "float", f"{rates['WER']:.2f}", "", ""]
            cells += [f"{rates['CER']:.2f}", "", f"{table['float_mb']:.1f}"]
            cells.append(f"{row['rtf']['float']:.3f}")
            lines.append(_line([*cells, *[""] * (len(columns) - len(cells))]))
        lines.append(_line([*_figures(row), *_optional(row, columns)]))
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _figures(row: Mapping) -> list[str]:
    rates, (low, high) = row["quantized"], row["delta_wer_ci"]
    # The speed of a simulation says nothing about integers.
    simulated = row["simulated"]
    return [
        row["set"],
        row["variant"],
        f"{rates['WER']:.2f}",
        f"{row['delta_wer']:+.2f}",
        f"{low:+.2f} to {high:+.2f}",
        f"{rates['CER']:.2f}",
        f"{row['delta_cer']:+.2f}",
        f"{row['size_mb']:.1f}",
        "" if simulated else f"{row['rtf']['quantized']:.3f}",
    ]


def _optional(row: Mapping, columns: list[str]) -> list[str]:
    cells = []
    if "float products" in columns:
        count = row.get("operations")
        cells.append(
            f"{count['float']} of {sum(count.values())}" if count else ""
        )
    if "made in" in columns:
        effort = Effort(**row["effort"]) if "effort" in row else None
        cells += (
            [f"{effort.seconds:.0f} s", effort.data()] if effort else ["", ""]
        )
    return cells
