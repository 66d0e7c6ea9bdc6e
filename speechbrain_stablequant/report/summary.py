"""The summary that a run prints at its end."""

from .format import (
    NOT_A_SPEED_CLAIM,
    gain,
    interval,
    is_simulated,
    number,
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
            low = rate.lower()
            lines.append(
                _line(
                    f"  {rate} %",
                    number(entry["float"][rate]),
                    number(entry["quantized"][rate]),
                    signed(entry.get(f"delta_{low}")),
                    interval(entry.get(f"delta_{low}_ci")),
                )
            )
        if entry.get("folder"):
            lines.append(
                _line(
                    "  folder's WER %",
                    number(entry["folder"]["float"]["WER"]),
                    number(entry["folder"]["quantized"]["WER"]),
                    "(it decodes greedily, unlike the recipe)",
                )
            )
    lines.append(
        _line(
            "size, MB",
            number(size["float"], 1),
            number(size["quantized"], 1),
            times(gain(size), "smaller", "larger"),
        )
    )
    lines.append(
        _line(
            "real-time factor",
            number(rtf["float"], 3),
            number(rtf["quantized"], 3),
            f"({NOT_A_SPEED_CLAIM})"
            if is_simulated(report)
            else times(gain(rtf), "faster", "slower"),
        )
    )
    return "\n".join(lines)


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
