"""The comparison of variants: ``comparison.json`` and its Markdown table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from ..core.plan import QuantizationPlan
from .results import Effort, Execution, SetResult, real_time_factors


def comparison(
    runs: Mapping[str, tuple[QuantizationPlan, Mapping[str, SetResult]]],
    executions: Mapping[str, Execution] | None = None,
    float_mb: float | None = None,
    efforts: Mapping[str, Effort] | None = None,
) -> dict:
    """Content of ``comparison.json``: one row per variant and test set.

    Arguments
    ---------
    runs : Mapping
        Plan and results by the variant's name.
    executions : Mapping, optional
        What was evaluated, and its size on disk, by the variant's name.
    float_mb : float, optional
        Size of the float32 model.
    efforts : Mapping, optional
        What each plan took, by the variant's name.

    Returns
    -------
    dict
        ``{"rows": [...]}`` with rates in percent.
    """
    rows = []
    for name, (plan, results) in runs.items():
        for set_name, result in results.items():
            rows.append(
                {
                    "variant": name,
                    "method": plan.method,
                    "weight_bits": plan.weight_bits,
                    "activation_bits": plan.activation_bits,
                    "set": set_name,
                    **result.to_dict(),
                }
            )
            if executions is not None:
                execution = executions[name]
                rows[-1]["size_mb"] = execution.size / 1e6
                rows[-1]["backend"] = execution.backend
                rows[-1]["rtf"] = real_time_factors([result])
                if execution.operations is not None:
                    rows[-1]["operations"] = dict(execution.operations)
            if efforts is not None and name in efforts:
                rows[-1]["effort"] = asdict(efforts[name])
    table = {"rows": rows}
    if float_mb is not None:
        table["float_mb"] = float_mb
    return table


def comparison_markdown(table: Mapping[str, list]) -> str:
    """Render the comparison as a Markdown table."""
    rows = table["rows"]
    columns = ["MB", "RTF"] if all("size_mb" in row for row in rows) else []
    if any("operations" in row for row in rows):
        columns.append("float products")
    if any("effort" in row for row in rows):
        columns += ["made in", "utterances used"]
    head = "| set | variant | WER % | change | 95 % interval | CER % | change |"
    lines = [
        head + "".join(f" {column} |" for column in columns),
        "|---|---|---|---|---|---|---|" + "---|" * len(columns),
    ]
    seen = set()
    for row in rows:
        if row["set"] not in seen:
            seen.add(row["set"])
            rates = row["float"]
            lines.append(
                f"| {row['set']} | float | {rates['WER']:.2f} | | | "
                f"{rates['CER']:.2f} | |"
                + _float_cells(row, table.get("float_mb"), columns)
            )
        rates = row["quantized"]
        low, high = row["delta_wer_ci"]
        lines.append(
            f"| {row['set']} | {row['variant']} | {rates['WER']:.2f} | "
            f"{row['delta_wer']:+.2f} | {low:+.2f} to {high:+.2f} | "
            f"{rates['CER']:.2f} | {row['delta_cer']:+.2f} |"
            + _cells(row, columns)
        )
    return "\n".join(lines) + "\n"


def _float_cells(
    row: Mapping, size: float | None, columns: Sequence[str]
) -> str:
    values = {
        "MB": None if size is None else f"{size:.1f}",
        "RTF": f"{row['rtf']['float']:.3f}" if "rtf" in row else None,
    }
    return _joined(values.get(column) for column in columns)


def _cells(row: Mapping, columns: Sequence[str]) -> str:
    values = {}
    if "size_mb" in row:
        values["MB"] = f"{row['size_mb']:.1f}"
        # The speed of a simulation says nothing about integers.
        if row["backend"] != "torch":
            values["RTF"] = f"{row['rtf']['quantized']:.3f}"
    if "operations" in row:
        count = row["operations"]
        total = count["float"] + count["integer"]
        values["float products"] = f"{count['float']} of {total}"
    if "effort" in row:
        effort = Effort(**row["effort"])
        values["made in"] = f"{effort.seconds:.0f} s"
        values["utterances used"] = effort.data()
    return _joined(values.get(column) for column in columns)


def _joined(cells: Iterable[str | None]) -> str:
    return "".join(" |" if cell is None else f" {cell} |" for cell in cells)
