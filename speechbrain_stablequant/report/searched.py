"""Tables and sentences of a report about its search."""

from .tables import NOT_MEASURED, count, number, percent, share, signed


def coverage(report: dict) -> str:
    """Of the units' intervals, such as "80 % "; empty where unknown."""
    level = report.get("search", {}).get("level")
    return "" if level is None else f"{100 * level:.4g} % "


def selected(rows: list[dict]) -> list[int]:
    """Which units were searched."""
    return [i for i, unit in enumerate(rows) if unit["selected"]]


def curves(
    rows: list[dict], rate: str
) -> tuple[list[str], list[list[str]], list[int]]:
    """Columns and rows of the percentiles that were tried, and which rows
    are headings."""
    columns = ["Clipping percentile", f"{rate} %", "Loss", "Outcome"]
    found, headings = [], []
    for unit in rows:
        curve = unit.get("curve") or ()
        if curve:
            headings.append(len(found))
            found.append([unit["name"], "", "", ""])
        for point in sorted(curve, key=lambda point: -point["cutoff"]):
            loss, bound = point.get("secondary"), ""
            if not point.get("complete", True):
                # Of the part of the set that was evaluated.
                loss, bound = None, "\u2265 "
            cells = [percent(point["cutoff"]), bound + number(point["wer"])]
            cells.append(NOT_MEASURED if loss is None else f"{loss:.6g}")
            found.append([*cells, _outcome(unit, point)])
    return columns, found, headings


def _outcome(unit: dict, point: dict) -> str:
    if point["cutoff"] == unit["cutoff"]:
        return "chosen"
    return "tried" if point.get("complete", True) else "stopped"


def cut(report: dict) -> str:
    """What the ranges cut, whatever decided them; empty where unknown."""
    shares = [row.get("beyond") for row in report.get("layers", ())]
    known = [x for x in shares if x is not None]
    if not known:
        return ""
    cutting = sum(x > 0 for x in known)
    if not cutting:
        return "No range cuts a value of the calibration."
    return (
        f"The ranges of {cutting} of {len(known)} layers end below the largest "
        f"input of the calibration, and cut up to {share(max(known))} of a "
        "layer's inputs (column Cut of each layer); a scale of least squared "
        "error does so by itself, also at 100 %."
    )


def rule(search: dict, rate: str) -> str:
    """How a percentile was chosen from those that were tried."""
    sure = search.get("selection") == "interval"
    if search.get("rule") == "divergence":
        return (
            "Loss: divergence from the float model's outputs. The percentile "
            f"of the lowest is chosen, unless its {rate} is higher than at "
            f"the largest percentile{' beyond the interval' if sure else ''}; "
            f"{rate} was measured at these two alone, if they differ."
        )
    if sure:
        return (
            "From the largest percentile down, one is chosen if it is better "
            f"than the best before it beyond the interval: in {rate}, or in "
            f"the loss where the interval of {rate} includes zero."
        )
    return (
        f"The lowest {rate} is chosen; a tie is decided by the lower loss, "
        "then by the larger percentile. Stopped: the evaluation ended once it "
        f"had more errors than the best; its {rate} is a lower bound, its "
        "loss that of a part of the set."
    )


def search(found: dict) -> list[list[str]]:
    """Settings, outcome and cost of a search."""
    metric = found.get("metric") or "WER"
    before, after = found.get("baseline_wer"), found.get("final_wer")
    final = number(after)
    if before is not None and after is not None:
        final += f" ({signed(after - before)} points)"
    level = found.get("level")
    rows = [
        ["Utterances", count(found.get("num_utterances"))],
        ["Metric", str(found.get("metric") or NOT_MEASURED)],
        ["Candidates compared by", str(found.get("rule") or NOT_MEASURED)],
        [
            "Utterances that compare them",
            count(found.get("ranking_utterances")),
        ],
        [
            f"{metric} of the float model on the search set, %",
            number(before),
        ],
        [f"{metric} of the quantized model on the search set, %", final],
        ["Selection threshold, points", percent(found.get("threshold"))],
        ["Selected by", str(found.get("selection") or NOT_MEASURED)],
        [
            "Coverage of the units' intervals",
            NOT_MEASURED if level is None else f"{100 * level:.4g} %",
        ],
        ["Evaluations", count(found.get("evaluations"))],
        ["Seconds", number(found.get("seconds"), 0)],
    ]
    return [row for row in rows if row[1] != NOT_MEASURED]


def training(epochs: list[dict]) -> list[list[str]]:
    return [
        [str(row["epoch"]), number(row["loss"], 4), number(row["wer"])]
        for row in epochs
    ]
