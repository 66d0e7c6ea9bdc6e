"""A report's tables as text, and the summary that a run prints."""

import re
from collections.abc import Callable, Iterable, Sequence

from ..core.error_rates import MOST_RECOGNIZED
from ..utils.typed import one_line

NOT_A_SPEED_CLAIM = "simulated arithmetic: not a speed claim"
NOT_MEASURED = "n/a"
_WIDTH = 80  # columns of the terminal
# Numbers with their signs, units, intervals and exponents.
_FIGURES = re.compile(r"(?:n/a|\bto\b|(?<=\d)e(?=[-+])|[\W\d_])*")
_ERRORS = "S / D / I"
_GREEDY = "decoded greedily, unlike the recipe"


def number(value: float | None, digits: int = 2) -> str:
    """A number with fixed decimals; n/a for None."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def text_columns(
    columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> list[int]:
    """Which columns stand to the left: the first, and those with words."""
    return [
        i
        for i, (_, *cells) in enumerate(zip(columns, *rows, strict=True))
        if i == 0 or not all(_FIGURES.fullmatch(cell) for cell in cells)
    ]


def both(pair: dict, digits: int) -> tuple[str, str]:
    return number(pair["float"], digits), number(pair["quantized"], digits)


def signed(value: float | None) -> str:
    """A difference with its sign; without one if it rounds to zero."""
    if value is None:
        return NOT_MEASURED
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text


def percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.10g}"


def share(value: float | None) -> str:
    """A share in percent, small ones too."""
    return NOT_MEASURED if value is None else f"{100 * value:.2g} %"


def interval(ends: Sequence[float] | None) -> str:
    if ends is None:
        return NOT_MEASURED
    return f"{signed(ends[0])} to {signed(ends[1])}"


def times(ratio: float | None, better: str, worse: str) -> str:
    """A ratio in words, such as "3.41x smaller"."""
    if ratio is None:
        return NOT_MEASURED
    if f"{max(ratio, 1 / ratio):.2f}" == "1.00":
        return "the same"
    times, word = (ratio, better) if ratio > 1 else (1 / ratio, worse)
    return f"{times:.2f}x {word}"


def gain(pair: dict) -> float | None:
    """Float value over quantized value; None if either is 0 or unknown."""
    before, after = pair["float"], pair["quantized"]
    return before / after if before and after else None


def is_simulated(report: dict) -> bool:
    return report["backend"] == "simulated"


def decisive_rate(report: dict) -> str:
    """What the metric that decides counts: WER, PER, CER."""
    entries = report["test"].values()
    return next((e["rate"] for e in entries if e.get("rate")), "WER")


def precision(report: dict) -> str:
    bits = report["bits"]
    return (
        f"{report['method']} W{bits['weight']}A{bits['activation']}, "
        f"{report['backend']}"
    )


def delta(value: float | None, ends: Sequence[float] | None) -> str:
    """A difference with its interval, if there is one."""
    if value is None or ends is None:
        return signed(value)
    return f"{signed(value)} ({interval(ends)})"


def word_errors(rates: dict) -> str:
    keys = ("substitutions", "deletions", "insertions")
    return " / ".join(count(rates[key]) for key in keys)


def count(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,}"


def tone(ends: Sequence[float]) -> str:
    """What a confidence interval of the WER's change supports."""
    low, high = ends
    return "bad" if low > 0 else "good" if high < 0 else "same"


def _says_nothing(entry: dict) -> bool:
    """Whether the float model recognizes too little to compare with."""
    return entry["float"]["WER"] > MOST_RECOGNIZED


def verdict_tone(entry: dict) -> str:
    """That of the decisive rate, and bad if any other rate rose."""
    if _says_nothing(entry):
        return "same"
    others = [tone(ends) for ends in _other_intervals(entry).values()]
    return "bad" if "bad" in others else tone(entry["delta_wer_ci"])


def verdict(entry: dict) -> str:
    """What the intervals of a set's rates show and leave possible."""
    if _says_nothing(entry):
        return "Nothing shown: the float model recognizes next to nothing."
    ends = entry["delta_wer_ci"]
    shown = tone(ends)
    words, place = {
        "bad": ("Worse", "lies above zero"),
        "good": ("Better", "lies below zero"),
        "same": ("No difference shown", "includes zero"),
    }[shown]
    text = f"{words}: the 95 % interval, {interval(ends)}, {place}"
    if shown == "same" and signed(ends[1]) != "0.00":
        text += f"; a rise of up to {number(ends[1])} points is possible"
    text += "."
    for name, (low, high) in _other_intervals(entry).items():
        found = tone((low, high))
        if found != "same":
            verb = {"bad": "rose", "good": "fell"}[found]
            least, most = sorted((abs(low), abs(high)))
            but = "" if found == shown else "But "
            text += (
                f" {but}{name} {verb} by {number(least)} to {number(most)} "
                "points (95 % interval)."
            )
    return text


def _other_intervals(entry: dict) -> dict[str, Sequence[float]]:
    """Intervals of the rates in a set's table that do not decide, by name."""
    found = {}
    for name, key in rates(entry).items():
        if key != "WER":
            found[name] = entry.get(f"delta_{key.lower()}_ci")
    for metric, row in entry.get("metrics", {}).items():
        if row["rate"] not in rates(entry):
            found[f"{row['rate']} ({metric})"] = row.get("delta_ci")
    return {name: ends for name, ends in found.items() if ends is not None}


def rates(entry: dict) -> dict[str, str]:
    """Keys of a set's rates by name; characters of phonemes have no meaning."""
    name = entry.get("rate", "WER")
    return {"WER": "WER", "CER": "CER"} if name == "WER" else {name: "WER"}


def results(report: dict) -> tuple[list[str], list[list[str]], list[int]]:
    """Columns and rows of what was measured, and which rows are headings."""
    rows, headings = [], []
    for name, entry in report["test"].items():
        headings.append(len(rows))
        utterances = count(entry["float"]["utterances"])
        rows.append([f"{name} ({utterances} utterances)", "", "", ""])
        for label, rate in rates(entry).items():
            key = f"delta_{rate.lower()}"
            change = delta(entry.get(key), entry.get(f"{key}_ci"))
            rows.append([f"{label} %", *_rates(entry, rate), change])
        for metric, row in entry.get("metrics", {}).items():
            if row["rate"] not in rates(entry):
                change = delta(row.get("delta"), row.get("delta_ci"))
                rows.append([f"{row['rate']} % ({metric})", *both(row, 2)])
                rows[-1].append(change)
        cells = [word_errors(entry[name]) for name in ("float", "quantized")]
        rows.append([_ERRORS, *cells, ""])
        if entry.get("folder"):
            cells = _rates(entry["folder"], "WER")
            label = next(iter(rates(entry)))
            rows.append([f"folder's {label} %", *cells, _GREEDY])
    if rows:
        headings.append(len(rows))
        rows.append(["Size and speed", "", "", ""])
    mb, rtf = report["size_mb"], report["rtf"]
    found = speed(report)
    if is_simulated(report):
        found = NOT_A_SPEED_CLAIM
    smaller = times(gain(mb), "smaller", "larger")
    rows.append(["Size, MB", *both(mb, 1), smaller])
    rows.append(["Real-time factor", *both(rtf, 3), found])
    columns = ["", "Float", "Quantized", "Change, 95 % interval"]
    # Leave out what nothing is known of.
    kept = [i for i, row in enumerate(rows) if {*row[1:3]} != {NOT_MEASURED}]
    marked = [place for place, i in enumerate(kept) if i in headings]
    return columns, [rows[i] for i in kept], marked


def gains(report: dict) -> str:
    """Size and speed in words, the first sentence of a report."""
    mb = report["size_mb"]
    before, after = both(mb, 1)
    text = times(gain(mb), "smaller", "larger")
    text += f" ({after} instead of {before} MB)"
    found = speed(report)
    if found != NOT_MEASURED and not is_simulated(report):
        text += f", {found} with {report['backend']}"
    return f"{text}."


def speed(report: dict) -> str:
    """The gain in time in words, with its interval, where enough batches took
    turns; no gain where the interval includes 1."""
    text = times(gain(report["rtf"]), "faster", "slower")
    found = report.get("speedup")
    if found is None:
        return text
    low, high = found["ratio_ci"]
    if low <= 1 <= high:
        text = "no difference shown"
    return f"{text} ({low:.2f}x to {high:.2f}x)"


def account(report: dict) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: shares of parameters and multiply-adds."""
    found = report["account"]
    rows = [
        [words, *(_share(found[x], key) for x in ("parameters", "products"))]
        for words, key in (
            ("Quantized", "quantized"),
            ("Weights alone", "weight_only"),
            ("Floating point", "float"),
        )
    ]
    return _measured(["", "Parameters", "Multiply-adds"], rows)


def _share(counts: dict | None, key: str) -> str:
    total = sum((counts or {}).values())
    return f"{100 * counts[key] / total:.1f} %" if total else NOT_MEASURED


def largest_float(report: dict) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the largest parts in floating point, and why."""
    found = report["account"]
    rows = [
        [
            row["name"],
            count(row["parameters"]),
            count(row["products"] if found["products"] else None),
            row["why"],
        ]
        for row in found["largest_float"]
    ]
    columns = ["In floating point", "Parameters", "Multiply-adds", "Why"]
    return _measured(columns, rows)


def _measured(
    columns: list[str], rows: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """A table without the columns of which nothing is known."""
    table = [columns, *rows]
    cells = enumerate(zip(*table, strict=True))
    kept = [i for i, (_, *column) in cells if {*column} != {NOT_MEASURED}]
    columns, *rows = ([row[i] for i in kept] for row in table)
    return columns, rows


def units(
    rows: list[dict], rate: str, coverage: str = ""
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the units; without a search only their sizes."""
    columns = {
        "Unit": [unit["name"] for unit in rows],
        "Layers": [count(unit["layers"]) for unit in rows],
        "Parameters": [count(unit["parameters"]) for unit in rows],
        "Bits": [" ".join(unit["bits"]) for unit in rows],
        "kB": [number(unit["bytes"] / 1e3, 1) for unit in rows],
    }
    if any(unit["selected"] or unit.get("wer") is not None for unit in rows):
        change = f"\u0394 {rate} alone"
        if any(unit.get("delta_wer_ci") for unit in rows):
            change += f", {coverage}interval"
        columns |= {
            change: [
                delta(unit["delta_wer"], unit.get("delta_wer_ci"))
                for unit in rows
            ],
            "Clipping percentile": [percent(x["cutoff"]) for x in rows],
        }
    return list(columns), list(map(list, zip(*columns.values(), strict=True)))


def layers(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what was decided for each layer."""
    columns = ["Layer", "Bits", "kB", "Clipping percentile", "Cut", "Why"]
    return columns, [
        [
            row["name"],
            row["bits"],
            number(row["bytes"] / 1e3, 1),
            percent(row["cutoff"]),
            share(row.get("beyond")),
            row["why"],
        ]
        for row in rows
    ]


def title(report: dict) -> str:
    model = report["model"]
    name = model.get("name") or next(iter(model["modules"].values()))
    return f"{name}: {report['title']}"


def described(report: dict) -> str:
    """The model in one line."""
    made = f"{report['created'][:16].replace('T', ' ')} UTC"
    model = report["model"]
    names = [f"{k} ({kind})" for k, kind in model["modules"].items()]
    size = f"{model['parameters'] / 1e6:.1f} million parameters"
    return ", ".join([*names, size, precision(report), made])


def calibration(report: dict) -> str:
    """What the ranges were calibrated with; empty if a plan does not say."""
    settings = report["settings"].get("calibration", {})
    found = report.get("calibration", {})
    asked = found.get("num_utterances") or settings.get("num_utterances")
    if asked is None and not settings:
        return ""
    number_of = "the default number of" if asked is None else count(asked)
    whole = found.get("drawn_from", "validation set")
    text = f"Calibration: {number_of} utterances of the {whole}"
    if settings.get("batch_size"):
        text += f", batches of {settings['batch_size']}"
    return f"{text}."


def settings(
    found: dict, is_read: Callable[[str], bool], prefix: str = ""
) -> list[list[str]]:
    """Names in the block ``quantize``, and values, of what was read."""
    rows = []
    for name, value in found.items():
        if isinstance(value, dict) and value:
            rows += settings(value, is_read, f"{prefix}{name}.")
        elif is_read(prefix + name):
            text = "default" if value is None else str(value)
            if isinstance(value, list | tuple | dict):
                text = ", ".join(map(str, value)) or "none"
            rows.append([prefix + name, text])
    return rows


def environment(report: dict) -> list[list[str]]:
    return [[key, str(x)] for key, x in report["environment"].items()]


def summary_table(report: dict) -> str:
    """Float against quantized as plain text, at most 80 columns wide."""
    _, rows, headings = results(report)
    lines = [
        one_line(precision(report), _WIDTH),
        _line("", "float", "quantized", "change, 95 % interval"),
    ]
    for i, (label, *cells) in enumerate(rows):
        if i in headings:
            name, _, utterances = label.rpartition(" (")
            tail = f" ({utterances}" if name else ""
            lines.append(one_line(name or label, _WIDTH - len(tail)) + tail)
        elif label != _ERRORS:
            lines.append(_line(f"  {one_line(label, 17)}", *cells))
    return "\n".join(lines)


def _rates(entry: dict, rate: str) -> tuple[str, str]:
    """One error rate of the float and of the quantized model."""
    return both({name: entry[name][rate] for name in ("float", "quantized")}, 2)


def _line(label: str, before: str, after: str, change: str) -> str:
    return f"{label:<19}{before:>9}{after:>11}  {change}".rstrip()
