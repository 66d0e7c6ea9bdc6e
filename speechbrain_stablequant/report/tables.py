"""A report's tables as text: their rows, and the summary that a run prints."""

from ..utils.typed import one_line
from .format import (
    NOT_A_SPEED_CLAIM,
    NOT_MEASURED,
    both,
    count,
    delta,
    gain,
    interval,
    is_simulated,
    number,
    percent,
    precision,
    signed,
    times,
    word_errors,
)

_WIDTH = 80  # columns of the terminal


def rates(entry: dict) -> dict[str, str]:
    """Keys of a set's rates by name; characters of phonemes have no meaning."""
    name = entry.get("rate", "WER")
    return {"WER": "WER", "CER": "CER"} if name == "WER" else {name: "WER"}


def others(tests: dict) -> list[list[str]]:
    """Metrics of the recipe beside those of :func:`verdict`."""
    return [
        [
            name,
            metric,
            row["rate"],
            *both(row, 2),
            delta(row.get("delta"), row.get("delta_ci")),
        ]
        for name, entry in tests.items()
        for metric, row in entry.get("metrics", {}).items()
        if row["rate"] not in rates(entry)
    ]


def verdict(tests: dict) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of both models' error rates."""
    columns = {
        "Test set": [
            f"{name} ({count(entry['float']['utterances'])} utterances)"
            for name, entry in tests.items()
        ]
    }
    entries = list(tests.values())
    models = ("float", "quantized")
    for name, rate in rates(entries[0]).items():
        for model in models:
            columns[f"{model.capitalize()} {name} %"] = [
                number(entry[model][rate]) for entry in entries
            ]
        key = f"delta_{rate.lower()}"
        columns[f"\u0394 {name}, 95 % interval"] = [
            delta(entry.get(key), entry.get(f"{key}_ci")) for entry in entries
        ]
    for model in models:
        columns[f"{model.capitalize()} S / D / I"] = [
            word_errors(entry[model]) for entry in entries
        ]
    # Drop columns that are empty in every row.
    empty = {NOT_MEASURED}
    filled = {k: cells for k, cells in columns.items() if set(cells) != empty}
    return list(filled), list(map(list, zip(*filled.values(), strict=True)))


def folder(tests: dict) -> list[list[str]]:
    """Error rates of inference folders that decode unlike the recipe."""
    found = {n: e["folder"] for n, e in tests.items() if e.get("folder")}
    return [
        [name, *_rates(entry, "WER"), *_rates(entry, "CER")]
        for name, entry in found.items()
    ]


def size(report: dict) -> list[list[str]]:
    mb, rtf = report["size_mb"], report["rtf"]
    speed = times(gain(rtf), "faster", "slower")
    return [
        ["Size in MB", *both(mb, 1), times(gain(mb), "smaller", "larger")],
        [
            "Real-time factor",
            *both(rtf, 3),
            NOT_A_SPEED_CLAIM if is_simulated(report) else speed,
        ],
    ]


def account(report: dict) -> list[list[str]]:
    """Shares of parameters and multiply-adds; empty for earlier reports."""
    found = report.get("account") or {}
    kinds = {
        "quantized": "Quantized",
        "weight_only": "Weights alone",
        "float": "Floating point",
    }
    return [
        [
            words,
            *(_share(found[what], key) for what in ("parameters", "products")),
        ]
        for key, words in kinds.items()
        if found
    ]


def _share(counts: dict | None, key: str) -> str:
    total = sum((counts or {}).values())
    return f"{100 * counts[key] / total:.1f} %" if total else NOT_MEASURED


def largest_float(report: dict) -> list[list[str]]:
    """The largest parts that stay floating point, and why."""
    rows = (report.get("account") or {}).get("largest_float", [])
    return [
        [x["name"], count(x["parameters"]), count(x["products"]), x["why"]]
        for x in rows
    ]


def units(rows: list[dict], rate: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the units; without a search only their sizes."""
    columns = {
        "Unit": [unit["name"] for unit in rows],
        "Layers": [count(unit.get("layers")) for unit in rows],
        "Parameters": [count(unit.get("parameters")) for unit in rows],
    }
    if any(unit["selected"] or unit.get("wer") is not None for unit in rows):
        columns |= {
            f"{rate} alone %": [number(unit.get("wer")) for unit in rows],
            f"\u0394 {rate} alone": [
                delta(unit["delta_wer"], unit.get("delta_wer_ci"))
                for unit in rows
            ],
            "Selected": ["yes" if x["selected"] else "no" for x in rows],
            "Clipping percentile": [percent(x["cutoff"]) for x in rows],
        }
    return list(columns), list(map(list, zip(*columns.values(), strict=True)))


def described(report: dict) -> str:
    """The model in one line; earlier reports do not say which."""
    parts = [precision(report), report["created"]]
    if "model" in report:
        model = report["model"]
        names = [f"{k} ({kind})" for k, kind in model["modules"].items()]
        millions = model["parameters"] / 1e6
        parts = [*names, f"{millions:.1f} million parameters", *parts]
    return ", ".join(parts)


def selected(rows: list[dict]) -> list[int]:
    return [i for i, unit in enumerate(rows) if unit["selected"]]


def search(found: dict) -> list[list[str]]:
    """Settings and cost of a search."""
    rows = [
        ["Utterances", count(found.get("num_utterances"))],
        ["Metric", str(found.get("metric") or NOT_MEASURED)],
        ["Candidates compared by", str(found.get("rule") or NOT_MEASURED)],
        [
            "Utterances that compare them",
            count(found.get("ranking_utterances")),
        ],
        [
            f"{found.get('metric') or 'WER'} of the float model, %",
            number(found.get("baseline_wer")),
        ],
        ["Selection threshold, points", percent(found.get("threshold"))],
        ["Selected by", str(found.get("selection") or NOT_MEASURED)],
        ["Coverage of the units' intervals", number(found.get("level"))],
        ["Evaluations", count(found.get("evaluations"))],
        ["Seconds", number(found.get("seconds"), 0)],
    ]
    return [row for row in rows if row[1] != NOT_MEASURED]


def training(epochs: list[dict]) -> list[list[str]]:
    return [
        [str(row["epoch"]), number(row["loss"], 4), number(row["wer"])]
        for row in epochs
    ]


def environment(report: dict) -> list[list[str]]:
    return [
        [key, NOT_MEASURED if value is None else str(value)]
        for key, value in report["environment"].items()
    ]


def summary_table(report: dict) -> str:
    """Float against quantized as plain text, at most 80 columns wide."""
    lines = [
        one_line(precision(report), _WIDTH),
        _line("", "float", "quantized", "difference", "95 % interval"),
    ]
    for name, entry in report["test"].items():
        utterances = f" ({entry['float']['utterances']} utterances)"
        lines.append(one_line(name, _WIDTH - len(utterances)) + utterances)
        for label, rate in rates(entry).items():
            key = f"delta_{rate.lower()}"
            change = signed(entry.get(key)), interval(entry.get(f"{key}_ci"))
            lines.append(_line(f"  {label} %", *_rates(entry, rate), *change))
        for _, _, label, *cells, _ in others({name: entry}):
            lines.append(_line(f"  {label} %", *cells, ""))
        if entry.get("folder"):
            cells = _rates(entry["folder"], "WER")
            said = "(it decodes greedily, unlike the recipe)"
            lines.append(_line("  folder's WER %", *cells, said))
    labels = ("size, MB", "real-time factor")
    for label, (_, *cells) in zip(labels, size(report), strict=True):
        lines.append(_line(label, *cells))
    return "\n".join(lines)


def _rates(entry: dict, rate: str) -> tuple[str, str]:
    """One error rate of the float and of the quantized model."""
    return both({name: entry[name][rate] for name in ("float", "quantized")}, 2)


def _line(
    label: str, before: str, after: str, change: str, ci: str = ""
) -> str:
    numbers = f"{label:<16}{before:>8}{after:>11}"
    # Without an interval the change is text, which may be long.
    if not ci:
        return f"{numbers}  {change}".rstrip()
    return f"{numbers}{change:>12}{ci:>20}"
