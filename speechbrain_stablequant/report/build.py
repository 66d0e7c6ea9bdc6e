"""Turns ``report.json`` into a document: what is said, in which order.

The document has no markup. ``markdown.py`` and ``html.py`` render it, so
that both say the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

NOT_A_SPEED_CLAIM = "simulated arithmetic: not a speed claim"
NOT_MEASURED = "n/a"

_CAPTIONS = {
    "sensitivity.png": (
        "Rise of the WER when one unit alone is quantized, in network order."
    ),
    "cutoffs.png": (
        "WER against the cut-off ratio, one panel for each unit that was "
        "searched. The large point is what was chosen. The axes differ."
    ),
    "histograms.png": (
        "Activations of the layers that were clipped most. What lies right "
        "of amax is saturated."
    ),
}


@dataclass(frozen=True)
class Text:
    """A paragraph. The tone says whether it is good news."""

    text: str
    tone: Literal["plain", "good", "same", "bad"] = "plain"


@dataclass(frozen=True)
class Bullets:
    """A list of short statements."""

    items: list[str]


@dataclass(frozen=True)
class Table:
    """Columns and rows of text. The first column is text, the rest numbers."""

    columns: list[str]
    rows: list[list[str]]
    highlighted: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Figure:
    """A plot, by the name of its file."""

    file: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    blocks: list[Text | Bullets | Table | Figure]


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    subtitle: str
    sections: list[Section]


def build_document(report: dict, figures: Sequence[str]) -> Document:
    """Says what a report says, without markup.

    Arguments
    ---------
    report : dict
        A checked report.
    figures : Sequence[str]
        Names of the plots that exist.

    Returns
    -------
    Document
        The verdict first, then the units, then how it was measured.
    """
    sections = [
        _verdict(report),
        _size_and_speed(report),
    ]
    if report["units"]:
        sections.append(_units(report, figures))
    if "histograms.png" in figures:
        sections.append(
            Section("Activation ranges", [_figure("histograms.png")])
        )
    sections.append(_measurement(report))
    sections.append(_warnings(report))
    if report.get("files"):
        rows = [[key, str(name)] for key, name in report["files"].items()]
        sections.append(Section("Files", [Table(["What", "File"], rows)]))
    subtitle = f"{precision(report)}, {report['created']}"
    return Document(report["title"], subtitle, sections)


def number(value: float | None, digits: int = 2) -> str:
    """A number with fixed decimals, or a mark that there is none.

    Arguments
    ---------
    value : float or None
        The number.
    digits : int
        Decimals.

    Returns
    -------
    str
        The text.

    Example
    -------
    >>> number(2.345), number(None), number(1205.06, 1)
    ('2.35', 'n/a', '1205.1')
    """
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference with its sign; what rounds to zero has none.

    Arguments
    ---------
    value : float or None
        The difference.

    Returns
    -------
    str
        The text.

    Example
    -------
    >>> signed(0.05), signed(-0.05), signed(-0.001)
    ('+0.05', '-0.05', '0.00')
    """
    if value is None:
        return NOT_MEASURED
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text


def percent(value: float | None) -> str:
    """A cut-off ratio with all its nines.

    Arguments
    ---------
    value : float or None
        The ratio in percent.

    Returns
    -------
    str
        The text.

    Example
    -------
    >>> percent(100.0), percent(99.99999)
    ('100', '99.99999')
    """
    return NOT_MEASURED if value is None else f"{value:.10g}"


def interval(ends: Sequence[float] | None) -> str:
    """A confidence interval.

    Arguments
    ---------
    ends : Sequence[float] or None
        Low and high.

    Returns
    -------
    str
        The text.

    Example
    -------
    >>> interval([-0.03, 0.07])
    '-0.03 to +0.07'
    """
    if ends is None:
        return NOT_MEASURED
    return f"{signed(ends[0])} to {signed(ends[1])}"


def times(ratio: float | None, better: str, worse: str) -> str:
    """A ratio in words, such as "3.41x smaller".

    Arguments
    ---------
    ratio : float or None
        Above 1 is better.
    better, worse : str
        What a ratio above and below 1 is called.

    Returns
    -------
    str
        The text.

    Example
    -------
    >>> times(2.0, "faster", "slower"), times(0.5, "faster", "slower")
    ('2.00x faster', '2.00x slower')
    """
    if ratio is None:
        return NOT_MEASURED
    if f"{max(ratio, 1 / ratio):.2f}" == "1.00":
        return "the same"
    if ratio > 1:
        return f"{ratio:.2f}x {better}"
    return f"{1 / ratio:.2f}x {worse}"


def gain(pair: dict) -> float | None:
    """How many times smaller the quantized number is than the float one.

    Arguments
    ---------
    pair : dict
        With ``float`` and ``quantized``.

    Returns
    -------
    float or None
        The ratio, None where it has no meaning.
    """
    before, after = pair["float"], pair["quantized"]
    return before / after if before and after else None


def is_simulated(report: dict) -> bool:
    """Whether integers were only imitated in floating point.

    Arguments
    ---------
    report : dict
        The report.

    Returns
    -------
    bool
        True for the simulated backend under each of its names.
    """
    backend = report["backend"].lower()
    return backend == "torch" or "simulat" in backend


def precision(report: dict) -> str:
    """Method, bits and backend in a few words.

    Arguments
    ---------
    report : dict
        The report.

    Returns
    -------
    str
        Such as "stablequant W8A8, openvino".
    """
    bits = report["bits"]
    return (
        f"{report['method']} W{bits['weight']}A{bits['activation']}, "
        f"{report['backend']}"
    )


def _verdict(report: dict) -> Section:
    tests = report["test"]
    if not tests:
        return Section("Verdict", [Text("No test set was evaluated.")])
    verdicts = [_verdict_of_set(name, entry) for name, entry in tests.items()]
    columns = [
        "Test set",
        "Float WER %",
        "Quantized WER %",
        "\u0394 WER, 95 % interval",
        "Float CER %",
        "Quantized CER %",
        "\u0394 CER, 95 % interval",
        "Float S / D / I",
        "Quantized S / D / I",
    ]
    rows = [_verdict_row(name, entry) for name, entry in tests.items()]
    # A column that no set fills would only take room.
    filled = [
        index
        for index in range(len(columns))
        if index == 0 or any(row[index] != NOT_MEASURED for row in rows)
    ]
    table = Table(
        [columns[index] for index in filled],
        [[row[index] for index in filled] for row in rows],
    )
    return Section("Verdict", [*verdicts, table, *_of_the_folder(tests)])


def _of_the_folder(tests: dict) -> list[Text | Table]:
    """The folder's own rates, where it decodes otherwise than the recipe."""
    found = {
        n: entry["folder"] for n, entry in tests.items() if entry.get("folder")
    }
    if not found:
        return []
    columns = [
        "As the inference folder decodes",
        "Float WER %",
        "Quantized WER %",
        "Float CER %",
        "Quantized CER %",
    ]
    rows = [
        [
            name,
            *(
                number(rates[model][rate])
                for rate in ("WER", "CER")
                for model in ("float", "quantized")
            ),
        ]
        for name, rates in found.items()
    ]
    return [
        Text(
            "The inference folder decodes greedily, and the recipe does "
            "otherwise. On the same outputs the folder has these rates."
        ),
        Table(columns, rows),
    ]


def _verdict_of_set(name: str, entry: dict) -> Text:
    """One sentence, which claims no more than the interval allows."""
    before, after = entry["float"]["WER"], entry["quantized"]["WER"]
    opening = (
        f"{name}: WER {number(before)} % in floating point, {number(after)} % "
        f"quantized"
    )
    ends = entry["delta_wer_ci"]
    if ends is None or entry["delta_wer"] is None:
        return Text(f"{opening}.")
    change = f"{opening}, {signed(entry['delta_wer'])} points"
    low, high = ends
    if low > 0:
        return Text(
            f"{change}. Worse: the 95 % interval, {interval(ends)}, lies "
            f"above zero.",
            "bad",
        )
    if high < 0:
        return Text(
            f"{change}. Better: the 95 % interval, {interval(ends)}, lies "
            f"below zero.",
            "good",
        )
    return Text(
        f"{change}. No difference shown: the 95 % interval, "
        f"{interval(ends)}, includes zero.",
        "same",
    )


def _verdict_row(name: str, entry: dict) -> list[str]:
    before, after = entry["float"], entry["quantized"]
    return [
        f"{name} ({_count(before['utterances'])} utterances)",
        number(before["WER"]),
        number(after["WER"]),
        _delta(entry["delta_wer"], entry["delta_wer_ci"]),
        number(before["CER"]),
        number(after["CER"]),
        _delta(entry.get("delta_cer"), entry.get("delta_cer_ci")),
        _word_errors(before),
        _word_errors(after),
    ]


def _delta(value: float | None, ends: Sequence[float] | None) -> str:
    if value is None or ends is None:
        return signed(value)
    return f"{signed(value)} ({interval(ends)})"


def _word_errors(rates: dict) -> str:
    keys = ("substitutions", "deletions", "insertions")
    if any(rates.get(key) is None for key in keys):
        return NOT_MEASURED
    return " / ".join(_count(rates[key]) for key in keys)


def _count(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,}"


def _size_and_speed(report: dict) -> Section:
    size, rtf = report["size_mb"], report["rtf"]
    simulated = is_simulated(report)
    stored = size.get("float_stored_as")
    label = f"Size in MB (float: {stored})" if stored else "Size in MB"
    speed = times(gain(rtf), "faster", "slower")
    rows = [
        [
            label,
            number(size["float"], 1),
            number(size["quantized"], 1),
            times(gain(size), "smaller", "larger"),
        ],
        [
            "Real-time factor",
            number(rtf["float"], 3),
            number(rtf["quantized"], 3),
            NOT_A_SPEED_CLAIM if simulated else speed,
        ],
    ]
    columns = ["", "Float", "Quantized", "Quantized is"]
    return Section("Size and speed", [Table(columns, rows)])


def _units(report: dict, figures: Sequence[str]) -> Section:
    units = report["units"]
    rows = [
        [
            unit["name"],
            _count(unit.get("layers")),
            _count(unit.get("parameters")),
            number(unit.get("wer")),
            _delta(unit["delta_wer"], unit.get("delta_wer_ci")),
            "yes" if unit["selected"] else "no",
            percent(unit["cutoff"]),
        ]
        for unit in units
    ]
    columns = [
        "Unit",
        "Layers",
        "Parameters",
        "WER alone %",
        "\u0394 WER alone",
        "Selected",
        "Cut-off %",
    ]
    chosen = {index for index, unit in enumerate(units) if unit["selected"]}
    intro = Text(
        f"{len(chosen)} of {len(units)} units were selected for the search "
        f"for a cut-off. A cut-off of 100 % cuts nothing."
    )
    plots = [
        _figure(name)
        for name in ("sensitivity.png", "cutoffs.png")
        if name in figures
    ]
    return Section("Units", [intro, *plots, Table(columns, rows, chosen)])


def _figure(name: str) -> Figure:
    return Figure(name, _CAPTIONS[name])


def _measurement(report: dict) -> Section:
    blocks: list[Text | Bullets | Table | Figure] = []
    search = report.get("search")
    if search is None:
        blocks.append(
            Text(
                f"No search was made: the method {report['method']} set every "
                f"range by itself."
            )
        )
    else:
        blocks.append(Table(["Search", "Value"], _search_rows(search)))
        training = search.get("training")
        if training:
            blocks.append(_training_table(training, search.get("epoch")))
        if search.get("threshold") is not None:
            blocks.append(
                Text(
                    "WER alone: one unit quantized with its largest activation "
                    "as range, the rest of the model in floating point, on the "
                    "search set. A unit is selected when its WER rises by more "
                    "than the threshold. In brackets: paired interval of the "
                    "rise."
                )
            )
    notes = [
        "WER and CER: all errors of a set divided by all words (characters) "
        "of its references, as jiwer counts. Characters include the spaces "
        "between words. S / D / I: substituted, deleted, inserted words.",
        "Interval: paired bootstrap over utterances, 95 % percentile "
        "interval of the difference in points (Bisani and Ney, ICASSP 2004).",
        "Size: the float model with every parameter in 32 bits; of the "
        "quantized one the file on disk, weights packed to their bits, scales "
        f"in 32 bits, all else as {_float_parts(report)}, as it was "
        "evaluated. 1 MB is 1e6 bytes.",
        "Real-time factor: seconds of computing for one second of audio, "
        "without the first batch and what is compiled for new lengths.",
    ]
    if is_simulated(report):
        notes[-1] += (
            f" Here {NOT_A_SPEED_CLAIM}, because integers were imitated in "
            f"floating point."
        )
    environment = [
        [key, NOT_MEASURED if value is None else str(value)]
        for key, value in report["environment"].items()
    ]
    blocks.append(Bullets(notes))
    blocks.append(Table(["Environment", "Value"], environment))
    return Section("How it was measured", blocks)


def _float_parts(report: dict) -> str:
    return report["size_mb"].get("quantized_floats") or "the file says"


def _search_rows(search: dict) -> list[list[str]]:
    rows = [
        ["Utterances", _count(search.get("num_utterances"))],
        ["Metric", str(search.get("metric") or NOT_MEASURED)],
        ["WER of the float model, %", number(search.get("baseline_wer"))],
        ["Selection threshold, points", percent(search.get("threshold"))],
        ["Selected by", str(search.get("selection") or NOT_MEASURED)],
        ["Coverage of the units' intervals", number(search.get("level"))],
        ["Evaluations", _count(search.get("evaluations"))],
        ["Seconds", number(search.get("seconds"), 0)],
    ]
    return [row for row in rows if row[1] != NOT_MEASURED]


def _training_table(history: list[dict], best: int | None) -> Table:
    rows = [
        [
            str(entry["epoch"]),
            number(entry["loss"], 4),
            number(entry["wer"]),
        ]
        for entry in history
    ]
    columns = ["Epoch of training", "Loss", "WER of the search set, %"]
    return Table(columns, rows, {best})


def _warnings(report: dict) -> Section:
    warnings = list(report.get("warnings") or [])
    block = Bullets(warnings) if warnings else Text("None.")
    return Section("Warnings", [block])
