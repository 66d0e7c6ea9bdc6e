"""Numbers of a report as text."""

from collections.abc import Sequence

NOT_A_SPEED_CLAIM = "simulated arithmetic: not a speed claim"
NOT_MEASURED = "n/a"


def number(value: float | None, digits: int = 2) -> str:
    """A number with fixed decimals; n/a for None."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


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
    if ratio > 1:
        return f"{ratio:.2f}x {better}"
    return f"{1 / ratio:.2f}x {worse}"


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
    if any(rates.get(key) is None for key in keys):
        return NOT_MEASURED
    return " / ".join(count(rates[key]) for key in keys)


def count(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,}"
