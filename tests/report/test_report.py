"""The report: one source, three forms, nothing claimed that was not shown."""

import copy
import json
import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from huggingface_hub import ModelCard

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.brain.keys import read_by
from speechbrain_stablequant.folder.card import Origin
from speechbrain_stablequant.report import build, plots
from speechbrain_stablequant.report.build import (
    escape_markdown,
    render_card,
    write_report,
)
from speechbrain_stablequant.report.comparison import _best_by_size
from speechbrain_stablequant.report.searched import rule
from speechbrain_stablequant.report.tables import (
    interval,
    number,
    percent,
    results,
    signed,
    summary_table,
    times,
    verdict_tone,
)
from speechbrain_stablequant.report.utterances import aligned
from speechbrain_stablequant.utils.files import read_json

PNG = b"\x89PNG\r\n\x1a\n"
ALL_FILES = {
    "report.json",
    "report.md",
    "report.html",
    "sensitivity.png",
    "cutoffs.png",
    "histograms.png",
}


def rates(wer, cer, errors):
    return {
        "WER": wer,
        "CER": cer,
        "utterances": 2620,
        "words": 52576,
        "substitutions": errors[0],
        "deletions": errors[1],
        "insertions": errors[2],
        "characters": 281530,
    }


def make_unit(name, delta, selected=False, cutoff=100.0, curve=()):
    return {
        "name": name,
        "layers": 6,
        "parameters": 12596224,
        "bits": ["W8A6"],
        "bytes": 12596224,
        "wer": None if delta is None else 2.2 + delta,
        "delta_wer": delta,
        "selected": selected,
        "cutoff": cutoff,
        "curve": [
            {"cutoff": ratio, "wer": wer, "secondary": None}
            for ratio, wer in curve
        ],
    }


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    """The same plot of the same numbers is drawn once in all tests."""
    for name in ("to_png", "to_svg"):
        monkeypatch.setattr(build, name, partial(remembered, name))


def remembered(name, draw, report):
    keys = ("units", "histograms", "search", "test")
    key = name, draw, json.dumps([report.get(key) for key in keys])
    if key not in DRAWN:
        DRAWN[key] = getattr(plots, name)(draw, report)
    return DRAWN[key]


DRAWN = {}


@pytest.fixture
def report():
    curve = [(100.0, 3.4), (99.99, 2.4), (99.0, None), (98.0, 61.0)]
    counts = [1000, 100, 0, 1]
    return {
        "format": 1,
        "created": "2025-11-24T03:52:00+00:00",
        "title": "wav2vec2 base",
        "method": "stablequant",
        "bits": {"weight": 8, "activation": 6},
        "backend": "openvino",
        "environment": {"python": "3.11", "threads": 2, "device": "cpu"},
        "test": {
            "test-clean": {
                "float": rates(2.17, 0.61, (901, 120, 110)),
                "quantized": rates(2.19, 0.62, (905, 125, 112)),
                "delta_wer": 0.02,
                "delta_wer_ci": [-0.03, 0.07],
                "delta_cer": 0.01,
                "delta_cer_ci": [-0.01, 0.03],
            }
        },
        "size_mb": {
            "float": 1262.1,
            "quantized": 315.5,
            "quantized_floats": "float16",
        },
        "rtf": {"float": 0.4, "quantized": 0.2},
        "search": {
            "num_utterances": 256,
            "baseline_wer": 2.2,
            "threshold": 0.25,
            "evaluations": 77,
            "seconds": 5123.4,
            "metric": "WER",
        },
        "units": [
            make_unit("conv.0", 1.2, True, 99.99, curve),
            make_unit("conv.1", -0.01),
            make_unit("ctc_lin", None),
        ],
        "histograms": {
            "conv.0.conv": {
                "unit": "conv.0",
                "range": 8.0,
                "counts": counts,
                "max": 7.9,
                "cutoff_amax": 3.0,
                "amax": 2.5,
            }
        },
        "warnings": ["the head stays in floating point"],
        "model": {"modules": {"enc": "Encoder"}, "parameters": 315e6},
        "account": {
            "parameters": {"quantized": 3, "weight_only": 0, "float": 1},
            "products": {"quantized": 9, "weight_only": 0, "float": 1},
            "largest_float": [
                {"name": "ctc", "parameters": 9, "products": 0, "why": "short"}
            ],
        },
        "layers": [
            {
                "name": "conv.0.conv",
                "unit": "conv.0",
                "bits": "W8A6",
                "bytes": 5120,
                "cutoff": 99.99,
                "beyond": None,
                "why": "the smallest squared error",
            }
        ],
        "settings": {},
        "command": "python train.py quant.yaml",
        "files": {"plan": "plan.json"},
    }


class Page(HTMLParser):
    """Text, attributes and balance of an HTML page."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.images, self.text = [], set(), [], []
        self.attributes = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [name for name, _ in attrs]
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def texts(folder):
    return {
        name: (folder / name).read_text(encoding="utf-8")
        for name in ("report.md", "report.html")
    }


def test_write_report_writes_all_files(report, tmp_path):
    folder = tmp_path / "deep" / "report"
    written = write_report(report, folder)
    assert written[0] == folder / "report.json"
    assert {path.name for path in written} == ALL_FILES
    assert {path.name for path in folder.iterdir()} == ALL_FILES
    assert read_json(folder / "report.json", "report") == report
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(PNG)


def test_the_same_report_gives_the_same_bytes(report, tmp_path):
    first = write_report(report, tmp_path / "a")
    DRAWN.clear()
    second = write_report(copy.deepcopy(report), tmp_path / "b")
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_all_forms_state_the_same_numbers(report, tmp_path):
    write_report(report, tmp_path)
    forms = texts(tmp_path)
    forms["report.html"] = "".join(Page(forms["report.html"]).text)
    for name, text in forms.items():
        for fact in (
            "2.17",
            "2.19",
            "+0.02 (-0.03 to +0.07)",
            "+0.01 (-0.01 to +0.03)",
            "901 / 120 / 110",
            "905 / 125 / 112",
            "2,620 utterances",
            "4.00x smaller",
            "2.00x faster",
            "Clipping percentile",
            "99.99",
            "256",
            "0.25",
            "the head stays in floating point",
            "plan.json",
        ):
            assert fact in text, (name, fact)
        headings = ("Verdict", "Warnings", "Sensitivity", "Bits", "How it was")
        places = [text.index(heading) for heading in headings]
        assert places == sorted(places), name


def test_words_stand_to_the_left_and_numbers_to_the_right(report, tmp_path):
    """The heading of a column as its cells, short ones too."""
    part = {"name": "conv", "parameters": 9, "products": 0, "why": "short"}
    counts = dict.fromkeys(("quantized", "weight_only", "float"), 1)
    report["account"] = {
        "parameters": counts,
        "products": counts,
        "largest_float": [part, {**part, "why": "because of all these words"}],
    }
    for unit in report["units"]:
        unit |= {"bits": ["W8A8"], "bytes": 1e3}
    write_report(report, tmp_path)
    forms = texts(tmp_path)
    found = re.findall(
        r"<th( class=\"text\")?>(.*?)</th>", forms["report.html"]
    )
    left = {name for kind, name in found if kind}
    right = {name for kind, name in found if not kind}
    assert left >= {"Why", "Bits", "Outcome", "Value", "File", "Unit"}
    assert right >= {"Float", "Quantized", "Layers", "kB", "Loss", "WER %"}
    assert right >= {"\u0394 WER alone", "Multiply-adds"}
    for why in ("short", "because of all these words"):
        (kind,) = re.findall(
            rf'<td class="([^"]*)"[^>]*>{why}<', forms["report.html"]
        )
        assert kind == "text"
    lines = forms["report.md"].splitlines()
    place = next(i for i, x in enumerate(lines) if x.endswith("| Why |"))
    assert lines[place + 1] == "| --- | ---: | ---: | --- |"


def test_html_is_self_contained(report, tmp_path):
    write_report(report, tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not page.tags & {"script", "link", "a", "iframe", "object"}
    assert "http://" not in source and "https://" not in source
    assert not [name for name in page.attributes if name.startswith("on")]
    # Each plot for a wide and for a narrow screen, in the page's colors.
    assert page.images == [] and source.count("<svg") == 2 * 3
    drawn = source[source.index("<svg") :]
    assert not re.search("(fill|stroke): #", drawn)
    assert all(f"var(--{name})" in drawn for name in ("ink", "blue", "rule"))


def test_markup_in_names_stays_text(report, tmp_path):
    nasty = "<script>alert('1')</script>|&amp; \"x\"\n$a$ `b` __c__ [d](e)"
    report["title"] = report["units"][0]["name"] = nasty
    report["warnings"] = [nasty]
    report["environment"][nasty] = nasty
    report["test"][nasty] = report["test"].pop("test-clean")
    report["histograms"] = {nasty: report["histograms"]["conv.0.conv"]}
    write_report(report, tmp_path)
    forms = texts(tmp_path)
    page = Page(forms["report.html"])
    assert "script" not in page.tags
    # Twice as title, once elsewhere.
    assert sum(text.endswith(nasty) for text in page.text) == 7
    markdown = forms["report.md"]
    assert not re.search(r"(?<!\\)<script", markdown)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    for row, following in pairwise(rows):
        if set(following) <= set("|-: "):  # a table's head
            assert cells(row) == cells(following)
    assert cells(rows[0]) == cells(rows[2]) == 4


def cells(row):
    return len(re.findall(r"(?<!\\)\|", row)) - 1


def test_without_optional_parts(report, tmp_path):
    del report["search"]
    report["histograms"], report["warnings"] = {}, []
    report["units"] = [make_unit("a", None)]
    entry = report["test"]["test-clean"]
    for key in ("delta_cer", "delta_cer_ci"):
        del entry[key]
    for system in ("float", "quantized"):
        entry[system]["CER"] = None
    report["rtf"] = {"float": None, "quantized": None}
    written = write_report(report, tmp_path)
    assert {path.suffix for path in written} == {".json", ".md", ".html"}
    for text in texts(tmp_path).values():
        assert "CER %" not in text  # nothing to put in that column
        assert "No search was made" in text
        assert "<svg" not in text and "![" not in text


def test_no_test_set_is_said(report, tmp_path):
    report["test"] = {}
    write_report(report, tmp_path)
    assert "No test set was evaluated." in texts(tmp_path)["report.md"]
    assert "WER" not in summary_table(report)


def test_plots_of_an_earlier_report_do_not_stay(report, tmp_path):
    write_report(report, tmp_path)
    (tmp_path / "other.png").write_bytes(PNG)
    report["histograms"] = {}
    report["units"][0]["curve"] = []
    write_report(report, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    gone = {"cutoffs.png", "histograms.png"}
    assert names == (ALL_FILES - gone) | {"other.png"}


@pytest.mark.parametrize(
    "backend, simulated",
    [
        ("simulated", True),
        ("torch_int8", False),
        ("openvino", False),
        ("triton", False),
    ],
)
def test_simulated_speed_is_no_claim(report, tmp_path, backend, simulated):
    report["backend"] = backend
    write_report(report, tmp_path)
    for text in (*texts(tmp_path).values(), summary_table(report)):
        assert ("simulated arithmetic: not a speed claim" in text) is simulated
        assert ("faster" in text) is not simulated


@pytest.mark.parametrize(
    "ends, tone, word",
    [
        ([-0.03, 0.07], "same", "No difference shown"),
        ([0.0, 0.07], "same", "No difference shown"),
        ([0.01, 0.07], "bad", "Worse"),
        ([-0.07, -0.01], "good", "Better"),
    ],
)
def test_verdict_claims_what_the_interval_allows(
    report, tmp_path, ends, tone, word
):
    report["test"]["test-clean"]["delta_wer_ci"] = ends
    write_report(report, tmp_path)
    html = texts(tmp_path)["report.html"]
    (verdict,) = re.findall(rf'<p class="{tone}">(.*?)</p>', html, re.DOTALL)
    assert f"{word}:" in verdict
    others = {"No difference shown", "Worse", "Better"} - {word}
    for text in texts(tmp_path).values():
        assert f"+0.02 points. {word}: " in " ".join(text.split())
        assert not any(f"{other}:" in text for other in others)


def verdict_of(report, folder):
    """The verdict in Markdown, and its class in HTML."""
    write_report(report, folder)
    forms = texts(folder)
    (line,) = re.findall("test-clean: WER.*", forms["report.md"])
    tones = re.findall('<p class="(good|same|bad)">', forms["report.html"])
    return line, *tones


def test_verdict_names_other_rates_that_changed(report, tmp_path):
    entry = report["test"]["test-clean"]
    entry["delta_wer_ci"], entry["delta_cer_ci"] = [-0.43, 2.2], [0.47, 1.35]
    line, tone = verdict_of(report, tmp_path)
    assert line.endswith(
        "No difference shown: the 95 % interval, -0.43 to +2.20, includes "
        "zero; a rise of up to 2.20 points is possible. But CER rose by 0.47 "
        "to 1.35 points (95 % interval)."
    )
    assert tone == "bad"
    entry["delta_wer_ci"], entry["delta_cer_ci"] = [-0.4, 0.0], [-0.3, -0.1]
    row = {"rate": "PER", "float": 1.0, "quantized": 1.1, "delta": 0.1}
    entry["metrics"] = {"per_metric": {**row, "delta_ci": [-0.1, 0.3]}}
    line, tone = verdict_of(report, tmp_path)
    assert line.endswith(
        "includes zero. But CER fell by 0.10 to 0.30 points (95 % interval)."
    )
    assert tone == "same"


def test_the_search_says_what_it_ended_with(report, tmp_path):
    report["search"]["final_wer"] = 2.5
    write_report(report, tmp_path)
    row = (
        "WER of the quantized model on the search set, % | 2.50 (+0.30 points)"
    )
    assert f"| {row} |" in texts(tmp_path)["report.md"]
    del report["search"]["baseline_wer"]  # as training leaves it
    write_report(report, tmp_path)
    assert "% | 2.50 |" in texts(tmp_path)["report.md"]


def test_why_a_percentile_was_chosen(report, tmp_path):
    best, tie, stopped = report["units"][0]["curve"][1:]
    best |= {"secondary": 0.25}
    tie |= {"wer": 2.4, "secondary": 0.5}
    stopped |= {"secondary": 0.75, "complete": False}
    write_report(report, tmp_path)
    text = texts(tmp_path)["report.md"]
    start = text.index("| **conv.0** |")
    assert text[start:].splitlines()[1:5] == [
        "| 100 | 3.40 | n/a | tried |",
        "| 99.99 | 2.40 | 0.25 | chosen |",
        "| 99 | 2.40 | 0.5 | tried |",
        "| 98 | \u2265 61.00 | n/a | stopped |",
    ]
    tied = "a tie is decided by the lower loss, then by the larger percentile"
    for form in texts(tmp_path).values():
        assert tied in " ".join(form.split())
    # No other rule is said to have decided.
    for other in ({"selection": "interval"}, {"rule": "divergence"}):
        assert "a tie" not in rule(other, "WER")


def test_a_float_model_that_recognizes_nothing_shows_nothing(report, tmp_path):
    (entry,) = report["test"].values()
    entry["float"]["WER"] = 99.0
    entry |= {"delta_wer_ci": [1.0, 2.0], "delta_cer_ci": [1.0, 2.0]}
    assert verdict_tone(entry) == "same"
    write_report(report, tmp_path)
    for text in texts(tmp_path).values():
        flat = " ".join(text.split())
        assert "Nothing shown: the float model recognizes next to" in flat
        assert "Worse" not in flat


def test_intervals_of_units_say_their_coverage(report, tmp_path):
    report["search"]["level"] = 0.8
    report["units"][0]["delta_wer_ci"] = [0.9, 1.5]
    write_report(report, tmp_path)
    text = texts(tmp_path)["report.md"]
    assert "\u0394 WER alone, 80 % interval |" in text
    assert "paired 80 % interval of the rise" in text
    assert "intervals | 80 % |" in text


def test_calibration_and_settings_are_said(report, tmp_path):
    block = {"num_utterances": None, "batch_size": 4, "num_bins": 4096}
    report["settings"] = {"include": ["*"], "exclude": [], "calibration": block}
    write_report(report, tmp_path)
    text = texts(tmp_path)["report.md"]
    assert "Calibration: the default number of utterances" in text
    for row in (
        r"include | \*",
        "exclude | none",
        "num_utterances | default",
        "num_bins | 4096",
    ):
        assert f"{row} |" in text
    report["calibration"] = {"num_utterances": 80}
    write_report(report, tmp_path)
    for text in texts(tmp_path).values():
        assert (
            "Calibration: 80 utterances of the validation set, batches of 4."
            in text
        )


def test_settings_that_are_not_read_are_in_the_json_alone(report, tmp_path):
    """What `stablequant keys max` leaves out."""
    report["settings"] = json.loads(json.dumps(QuantizeConfig().settings()))
    write_report(report, tmp_path, read_by("max"))
    text = texts(tmp_path)["report.md"]
    shown = set(re.findall(r"^\| ([\w.]+) \|", text, re.MULTILINE))
    assert {"weight_bits", "calibration.num_bins"} <= shown
    left_out = {"calibration.percentile", "search.cutoffs", "search.level"}
    assert not shown & left_out
    assert read_json(tmp_path / "report.json", "report") == report
    write_report(report, tmp_path, read_by("stablequant"))
    text = texts(tmp_path)["report.md"]
    assert "| search.cutoffs |" in text and "calibration.percentile" not in text


def test_a_calibrator_clips_without_a_search(report, tmp_path):
    """By least squares; the picture of one that clips nothing is left out."""
    del report["search"]
    report["units"] = [make_unit("conv.0", None)]
    write_report(report, tmp_path)
    text = texts(tmp_path)["report.md"]
    assert "No clipping percentile was searched. The clipping" in text
    assert "histograms.png" in text
    report["histograms"]["conv.0.conv"]["amax"] = 7.9  # the largest
    write_report(report, tmp_path)
    text = texts(tmp_path)["report.md"]
    assert "Sensitivity" not in text and "histograms.png" not in text


def test_a_search_of_another_method_is_not_explained_by_thresholds(
    report, tmp_path
):
    del report["search"]["threshold"]
    report["search"]["final_wer"] = 2.5
    report["units"] = [make_unit("conv.0", None)]
    write_report(report, tmp_path)
    text = texts(tmp_path)["report.md"]
    assert "| Evaluations | 77 |" in text
    for words in ("selected", "The lowest", "searched", "A unit's curve"):
        assert words not in text


def test_figures_of_a_narrow_page_stay_in_one_line(report, tmp_path):
    """Such as "90 / 17 / 15"; cells of words are broken."""
    write_report(report, tmp_path)
    page = texts(tmp_path)["report.html"]
    narrow = page[page.index("@media (max-width") : page.index("@page")]
    rules = re.findall(r"([^{}]+) \{[^{}]*white-space: normal", narrow)
    assert [x.strip() for x in rules] == [
        "table:not(.blocks) td.text",
        ".blocks td",
    ]
    assert "td:not(:first-child) { white-space: nowrap; }" in page
    assert '<td data-name="Float">901 / 120 / 110</td>' in page


def test_a_plan_that_was_given(report, tmp_path):
    """Nothing was calibrated, and no multiply-adds were counted."""
    part = {"name": "conv", "parameters": 9, "products": 0, "why": "short"}
    report["account"] = {
        "parameters": dict.fromkeys(("quantized", "weight_only", "float"), 1),
        "products": None,
        "largest_float": [part],
    }
    report["settings"] = {"calibration": {"num_utterances": 4}}
    report["layers"] = [
        {"name": "conv.0", "bits": "W8A8", "bytes": 9, "cutoff": 99.9}
        | {"beyond": 0.001, "why": "cut"}
    ]
    report |= {"histograms": {}, "units": [make_unit("conv.0", None)]}
    write_report(report, tmp_path)
    for name, text in texts(tmp_path).items():
        assert "Multiply-adds" not in text, name
        assert "The plan was given" in text, name
        assert "The ranges of 1 of 1 layers end below" in text, name
    report["calibration"] = {"num_utterances": 4, "drawn_from": "manifest"}
    write_report(report, tmp_path)
    assert "The plan was given" not in texts(tmp_path)["report.html"]


def test_nan_is_named_before_anything_is_written(report, tmp_path):
    report["units"][1]["delta_wer"] = float("nan")
    with pytest.raises(ValueError, match=r"nan at 'units\.1\.delta_wer'"):
        write_report(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "ends, said",
    [
        ([1.9, 2.2], "2.00x faster (1.90x to 2.20x)"),
        ([0.9, 3.1], "no difference shown (0.90x to 3.10x)"),
    ],
)
def test_a_speed_has_an_interval(report, tmp_path, ends, said):
    report["speedup"] = {"batches": 9, "ratio": 2.0, "ratio_ci": ends}
    write_report(report, tmp_path)
    for text in (*texts(tmp_path).values(), summary_table(report)):
        assert said in text


def test_summary_fits_the_terminal(report):
    lines = summary_table(report).splitlines()
    assert lines[0] == "stablequant W8A6, openvino"
    assert [" ".join(line.split()) for line in lines[3:]] == [
        "WER % 2.17 2.19 +0.02 (-0.03 to +0.07)",
        "CER % 0.61 0.62 +0.01 (-0.01 to +0.03)",
        "Size and speed",
        "Size, MB 1262.1 315.5 4.00x smaller",
        "Real-time factor 0.400 0.200 2.00x faster",
    ]
    entry = report["test"]["test-clean"]
    entry["delta_wer_ci"] = [-100.0, 100.0]
    report["test"] = {"a\nvery " + "long name " * 20: entry}
    report["backend"] = "simulated"
    report["method"] = "m" * 200
    report["size_mb"] = {"float": 123456.7, "quantized": 1.2}
    lines = summary_table(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 8
    assert "(2,620 utterances)" in lines[2]


def bars(figure):
    return [patch.get_width() for patch in figure.axes[0].patches]


def test_sensitivity_plot(report):
    figure = plots.draw_sensitivity(report)
    axes = figure.axes[0]
    assert bars(figure) == [1.2, -0.01, 0]
    assert [text.get_text() for text in axes.texts] == ["+1.20", "-0.01", "n/a"]
    low, high = axes.get_ylim()
    assert low > high  # the first unit is at the top
    selected, other, _ = [patch.get_facecolor() for patch in axes.patches]
    assert selected != other
    assert axes.get_lines()[-1].get_xdata()[0] == 0.25
    assert axes.get_xlim()[0] < -0.01 and axes.get_xlim()[1] > 1.2


def test_sensitivity_plot_shows_small_bars_next_to_a_ruined_unit(report):
    report["units"][0]["delta_wer"] = 90.0
    report["units"][1]["delta_wer"] = 0.2
    axes = plots.draw_sensitivity(report).axes[0]
    ends = axes.transData.transform([(0.0, 0), (0.2, 0), (90.0, 0)])[:, 0]
    assert (ends[1] - ends[0]) / (ends[2] - ends[0]) > 0.1


@pytest.mark.parametrize("delta", [0.0, -0.4])
def test_sensitivity_plot_without_any_rise(report, delta):
    del report["search"]
    report["units"] = [make_unit("a", delta)]
    axes = plots.draw_sensitivity(report).axes[0]
    low, high = axes.get_xlim()
    assert low <= delta <= 0 < high


def test_cutoff_plot(report):
    (axes,) = plots.draw_cutoffs(report).axes
    assert axes.get_title(loc="left") == "conv.0: 99.99 %"
    baseline, curve, chosen = axes.get_lines()
    assert list(baseline.get_ydata()) == [2.2, 2.2]
    assert list(curve.get_ydata()) == [3.4, 2.4, 61.0]  # without the null
    assert list(chosen.get_ydata()) == [2.4]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["100", "99.99", "98"]
    assert axes.get_yscale() == "log"  # 61 must not flatten the rest


def test_many_units_and_long_names_do_not_overlap(report):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    name = "modules.wav2vec2.model.encoder.with.a.long.path.layers."
    report["units"] = [make_unit(f"{name}{i}", 100 - i) for i in range(60)]
    figure = plots.draw_sensitivity(report)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    labels = axes.get_yticklabels()
    assert len({label.get_text() for label in labels}) == 60
    for group in (labels, axes.texts):
        boxes = [item.get_window_extent() for item in group]
        assert all(box.x0 >= 0 for box in boxes)
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)
        assert not any(one.overlaps(two) for one, two in pairwise(boxes))
    right = axes.get_window_extent().x1
    assert min(item.get_window_extent().x0 for item in axes.texts) > right


def test_histogram_plot_shows_the_six_most_clipped(report):
    entry = report["histograms"]["conv.0.conv"]
    report["histograms"] = {
        f"layer.{i}": {**entry, "amax": 1.0 + i} for i in range(10)
    }
    report["histograms"]["empty"] = {**entry, "counts": [0, 0], "amax": 0.1}
    figure = plots.draw_histograms(report)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"layer.{i}" for i in range(6)]
    marks = [line.get_xdata()[0] for line in figure.axes[0].get_lines()]
    assert marks == [7.9, 3.0, 1.0]


def test_matplotlib_is_imported_late_and_without_pyplot(report, tmp_path):
    """And its hundreds of lines about fonts are in no recipe's log."""
    (tmp_path / "in.json").write_text(json.dumps(report))
    code = (
        "import json, logging, sys\n"
        "logging.basicConfig(filename='log.txt', level=logging.DEBUG)\n"
        "from pathlib import Path\n"
        "from speechbrain_stablequant.report.build import write_report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "write_report(json.load(open('in.json')), Path('out'))\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    # a user's style must not reach the report
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: black\n")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert "findfont" not in (tmp_path / "log.txt").read_text()
    write_report(report, tmp_path / "here")
    for name in ("sensitivity.png", "cutoffs.png", "histograms.png"):
        one, two = tmp_path / "out" / name, tmp_path / "here" / name
        assert one.read_bytes() == two.read_bytes()


# -- a folder that decodes otherwise than the recipe -------------------------


def with_folder(report):
    """The report of a recipe that decodes by beams."""
    report["test"]["test-clean"]["folder"] = {
        "float": rates(2.91, 0.81, (1, 2, 3)),
        "quantized": rates(2.96, 0.83, (1, 2, 3)),
    }
    return report


def test_rates_of_the_folder_stand_beside_those_of_the_recipe(report, tmp_path):
    write_report(with_folder(report), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    greedily = "decoded greedily, unlike the recipe"
    assert f"| folder's WER % | 2.91 | 2.96 | {greedily} |" in text
    (line,) = (x for x in summary_table(report).splitlines() if "folder" in x)
    assert "2.91" in line
    assert "2.96" in line
    assert len(line) <= 80


def test_no_word_of_a_folder_that_decodes_as_the_recipe(report, tmp_path):
    write_report(report, tmp_path)
    assert "folder" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "folder" not in summary_table(report)


# -- numbers and names as text -----------------------------------------------


def test_numbers():
    assert number(2.345) == "2.35" and number(None) == "n/a"
    assert number(1205.06, 1) == "1205.1"
    assert signed(0.05) == "+0.05" and signed(-0.05) == "-0.05"
    assert signed(-0.001) == "0.00"
    assert percent(100.0) == "100" and percent(99.99999) == "99.99999"
    assert interval([-0.03, 0.07]) == "-0.03 to +0.07"
    assert times(2.0, "faster", "slower") == "2.00x faster"
    assert times(0.5, "faster", "slower") == "2.00x slower"
    assert times(1.001, "faster", "slower") == "the same"


def test_markdown_escape():
    text = "ctc_lin | <b>\n_x_"
    assert escape_markdown(text) == r"ctc_lin \| \<b\> \_x\_"


def test_best_point_of_each_size():
    points = [(10.0, 90.0), (10.1, 36.0), (17.0, 35.0), (17.1, 36.0)]
    assert _best_by_size(points) == [(10.1, 36.0), (17.0, 35.0)]


def test_phonemes(report, tmp_path):
    """A recipe that counts phonemes, and characters beside them."""
    entry = report["test"]["test-clean"]
    entry["rate"] = report["search"]["metric"] = "PER"
    other = {"float": 1.5, "quantized": 1.75, "delta": 0.25}
    entry["metrics"] = {
        "per_metrics": {"rate": "PER", "float": 2.17, "quantized": 2.19},
        "cer_metric": {"rate": "CER", "delta_ci": [0.1, 0.4], **other},
    }
    text = summary_table(report)
    assert "PER %" in text
    assert "WER" not in text
    _, rows, _ = results(report)
    assert [row[:2] for row in rows[1:3]] == [
        ["PER %", "2.17"],
        ["CER % (cer_metric)", "1.50"],
    ]
    write_report(report, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "WER" not in html
    assert "cer_metric" in html
    assert "0.25 (+0.10 to +0.40)" in html


# -- utterances ----------------------------------------------------------------


def test_words_are_aligned_under_the_reference(report, tmp_path):
    row = {
        "reference": "THE CAT SAT DOWN",
        "float": "THE CAT SAT",
        "quantized": "OH THE <b>KAT</b> DOWN",
    }
    columns = aligned(row)
    assert [" ".join(filter(None, x)) for x in zip(*columns, strict=True)] == [
        *row.values()
    ]
    assert columns[0] == ("", "", "OH")
    assert ("CAT", "CAT", "<b>KAT</b>") in columns
    assert aligned({"reference": "", "float": "", "quantized": "A"}) == [
        ("", "", "A")
    ]
    row |= {"id": "u1", "errors": [1, 3]}
    report["utterances"] = {"test-clean": [row]}
    write_report(report, tmp_path)
    html, markdown = (texts(tmp_path)[f"report.{x}"] for x in ("html", "md"))
    assert "<b>&lt;b&gt;KAT&lt;/b&gt;</b>" in html
    assert "    quantized OH THE <b>KAT</b>" in markdown


# -- the model card ------------------------------------------------------------


def test_card_is_read_as_it_was_meant(report, tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: a/base\n---\n"
    )
    origin = Origin.of(tmp_path, ["The references are the float model's."])
    text = render_card(report, origin, "EncoderASR", True)
    card = ModelCard(text)
    data, (result,) = card.data, card.data.eval_results
    assert (data.license, data.language, data.base_model) == (
        *("apache-2.0", ["en"]),
        "a/base",
    )
    assert data.library_name == "speechbrain" and "w8a6" in data.tags
    assert (result.dataset_name, result.metric_type) == ("test-clean", "wer")
    assert result.metric_value == 2.19
    assert result.metric_args["change_interval_95"] == [-0.03, 0.07]
    assert "The references are the float model's." in card.text
    assert "```bash\npip install " in card.text
    codes = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert ["load(" in x or "EncoderASR" in x for x in codes] == [True, True]
    for code in codes:
        compile(code, "card", "exec")
    only = render_card(report, Origin(), "WhisperASR", False)
    assert "speechbrain_stablequant.load" not in only
    assert "base_model" not in only and "license" not in only


@pytest.mark.parametrize(
    "source, base",
    [("facebook/hubert-base-ls960", True), ("/home/me/model", False), ("", 0)],
)
def test_card_names_no_path(source, base):
    assert Origin.of(source).base_model == (source if base else None)


def test_a_broken_card_of_the_source_ends_no_run(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert Origin.of(tmp_path) == Origin()
    assert "README.md tells no license" in caplog.text
