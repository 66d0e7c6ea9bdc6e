"""The summary that a run prints at its end."""

from .format import (
    NOT_A_SPEED_CLAIM,
    both,
    gain,
    interval,
    is_simulated,
    precision,
    signed,
    times,
)

WIDTH = 80


def summary_table(report: dict) -> str:
    """Float against quantized as plain text, at most 80 columns wide."""
    size, rtf = report["size_mb"], report["rtf"]
    lines = [
        _shorten(precision(report), WIDTH),
        _line("", "float", "quantized", "difference", "95 % interval"),
    ]
    for name, entry in report["test"].items():
        utterances = f" ({entry['float']['utterances']} utterances)"
        lines.append(_shorten(name, WIDTH - len(utterances)) + utterances)
        for rate in ("WER", "CER"):
            key = f"delta_{rate.lower()}"
            change = signed(entry.get(key)), interval(entry.get(f"{key}_ci"))
            lines.append(_line(f"  {rate} %", *_rates(entry, rate), *change))
        if entry.get("folder"):
            rates = _rates(entry["folder"], "WER")
            said = "(it decodes greedily, unlike the recipe)"
            lines.append(_line("  folder's WER %", *rates, said))
    smaller = times(gain(size), "smaller", "larger")
    faster = times(gain(rtf), "faster", "slower")
    if is_simulated(report):
        faster = f"({NOT_A_SPEED_CLAIM})"
    lines.append(_line("size, MB", *both(size, 1), smaller))
    lines.append(_line("real-time factor", *both(rtf, 3), faster))
    return "\n".join(lines)


def _rates(entry: dict, rate: str) -> tuple[str, str]:
    return both({name: entry[name][rate] for name in ("float", "quantized")}, 2)


def _line(
    label: str, before: str, after: str, change: str, ci: str = ""
) -> str:
    numbers = f"{label:<16}{before:>8}{after:>11}"
    # Without an interval the change is text, which may be long.
    if not ci:
        return f"{numbers}  {change}".rstrip()
    return f"{numbers}{change:>12}{ci:>20}"


def _shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."
