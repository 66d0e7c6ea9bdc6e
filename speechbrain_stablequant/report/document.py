"""Turn ``report.json`` into a document: the text and its order."""

from collections.abc import Sequence

from .blocks import Bullets, Document, Figure, Section, Table, Text
from .format import (
    NOT_A_SPEED_CLAIM,
    NOT_MEASURED,
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


def build_document(report: dict, figures: Sequence[str]) -> Document:
    """Turn a report into a document; ``figures``: file names of its plots."""
    sections = [_verdict(report), _size_and_speed(report)]
    if report["units"]:
        sections.append(_units(report, figures))
    if "histograms.png" in figures:
        sections.append(
            Section("Activation ranges", [_figure("histograms.png")])
        )
    sections.append(_measurement(report))
    sections.append(_warnings(report))
    rows = [[key, str(name)] for key, name in report["files"].items()]
    sections.append(Section("Files", [Table(["What", "File"], rows)]))
    subtitle = f"{precision(report)}, {report['created']}"
    return Document(report["title"], subtitle, sections)


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
    # Drop columns that are empty in every row.
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
    """The folder's error rates, where its decoder is not the recipe's."""
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
            "The inference folder decodes greedily, unlike the recipe. On the "
            "same outputs it has these error rates."
        ),
        Table(columns, rows),
    ]


def _verdict_of_set(name: str, entry: dict) -> Text:
    """One sentence that claims no more than the interval supports."""
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
        f"{name} ({count(before['utterances'])} utterances)",
        number(before["WER"]),
        number(after["WER"]),
        delta(entry["delta_wer"], entry["delta_wer_ci"]),
        number(before["CER"]),
        number(after["CER"]),
        delta(entry.get("delta_cer"), entry.get("delta_cer_ci")),
        word_errors(before),
        word_errors(after),
    ]


def _size_and_speed(report: dict) -> Section:
    size, rtf = report["size_mb"], report["rtf"]
    simulated = is_simulated(report)
    speed = times(gain(rtf), "faster", "slower")
    rows = [
        [
            "Size in MB",
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
            count(unit.get("layers")),
            count(unit.get("parameters")),
            number(unit.get("wer")),
            delta(unit["delta_wer"], unit.get("delta_wer_ci")),
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
        f"in 32 bits, all else as {report['size_mb']['quantized_floats']}, as "
        "it was evaluated. 1 MB is 1e6 bytes.",
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


def _search_rows(search: dict) -> list[list[str]]:
    rows = [
        ["Utterances", count(search.get("num_utterances"))],
        ["Metric", str(search.get("metric") or NOT_MEASURED)],
        ["WER of the float model, %", number(search.get("baseline_wer"))],
        ["Selection threshold, points", percent(search.get("threshold"))],
        ["Selected by", str(search.get("selection") or NOT_MEASURED)],
        ["Coverage of the units' intervals", number(search.get("level"))],
        ["Evaluations", count(search.get("evaluations"))],
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
    warnings = report["warnings"]
    block = Bullets(warnings) if warnings else Text("None.")
    return Section("Warnings", [block])
