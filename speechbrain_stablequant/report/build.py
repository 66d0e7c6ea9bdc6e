"""Assembles what a run measured into ``report.json``, and writes the report."""

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import nn

from ..core.account import account, layer_sizes
from ..core.histogram import Histogram
from ..core.plan import PLAN_FILE, QuantizationPlan
from ..folder.card import Origin, card_header
from ..folder.recognizer_spec import HYPERPARAMS_FILE
from ..folder.weights_file import MODEL_FOLDER, WEIGHTS_FILE
from ..utils.files import write_atomic, write_json
from . import searched, tables, utterances
from .plots import FIGURES, draw_figures, to_png, to_svg
from .results import Effort, Execution, SetResult, real_time_factors, speedup
from .utterances import worst_utterances

FORMAT = 1
COARSE_BINS = 128  # histogram bars in the report


# Characters that Markdown or HTML would take for markup. Underscores inside
# words are not markup, and most names have one.
_MARKUP = re.compile(r"[\\`*<>|\[\]#~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def float_size(modules: Mapping[str, nn.Module]) -> int:
    """Bytes of a float model on disk: every parameter once, as float32."""
    counts = {
        id(parameter): parameter.numel()
        for module in modules.values()
        for parameter in module.parameters()
    }
    return torch.float32.itemsize * sum(counts.values())


def build_report(
    plan: QuantizationPlan,
    results: Mapping[str, SetResult],
    modules: Mapping[str, nn.Module],
    histograms: Mapping[str, Histogram],
    environment: Mapping[str, Any],
    execution: Execution,
    warnings: Sequence[str] = (),
    name: str | None = None,
    utterances: bool = True,
    effort: Effort | None = None,
    drawn_from: str = "validation set",
) -> dict:
    """Assemble the content of ``report.json``.

    ``modules`` are all modules of the recognizer; ``histograms`` are empty for
    a plan that was given. Rates and clipping percentiles (``cutoff``) are in
    percent, differences in points; what was not measured is null::

        {"format": 1, "created": ISO time, "title", "method", "backend",
         "model": {"name", "modules": {KEY: class}, "parameters"},
         "bits": {"weight": 8, "activation": 8},
         "environment": {"python": "3.11.7", ...},
         "test": {SET: {"float": RATES, "quantized": RATES,
                        "delta_wer", "delta_wer_ci": [low, high],
                        "delta_cer", "delta_cer_ci": [low, high],
                        "folder": {"float": RATES, "quantized": RATES}}},
         "size_mb": {"float", "quantized", "quantized_floats": "float16"},
         "rtf": {"float", "quantized"},
         "speedup": {"batches", "ratio", "ratio_ci": [low, high]},
         "search": {"num_utterances", "baseline_wer", "final_wer",
                    "threshold", "evaluations", "metric", ...},
         "calibration": {"num_utterances", "drawn_from": such as "manifest"},
         "settings": those that decided the plan,
         "account": {"parameters": {"quantized", "weight_only", "float"},
                     "products": likewise, "largest_float": [{"name",
                     "parameters", "products", "why"}]},
         "units": [{"name", "layers", "parameters", "wer", "delta_wer",
                    "delta_wer_ci", "selected", "cutoff", "bits", "bytes",
                    "curve": [{"cutoff", "wer", "secondary"}]}],
         "layers": [{"name", "unit", "bits": "W8A8", "parameters", "bytes",
                     "cutoff", "beyond": share of inputs, "why"}],
         "utterances": {SET: [{"id", "reference", "float", "quantized",
                               "errors": [float, quantized]}]},
         "command": what started the process,
         "histograms": {LAYER: {"unit", "range", "counts", "max",
                                "cutoff_amax", "amax", "beyond"}},
         "warnings": [str], "files": {"plan": "plan.json"}}

    RATES are those of ``ErrorRates.to_dict``. ``folder`` is present where
    the inference folder's decoder differs from the recipe's, ``search``
    where there was one, ``calibration`` where ``effort`` says it.
    """
    keys = modules if execution.keys is None else execution.keys
    stored = {key: modules[key] for key in keys}
    layers = _layers(plan, modules)
    report = {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "title": f"W{plan.weight_bits}A{plan.activation_bits} {plan.method}",
        "model": _model(name, stored),
        "method": plan.method,
        "bits": {
            "weight": plan.weight_bits,
            "activation": plan.activation_bits,
        },
        "backend": "simulated" if execution.simulated else execution.backend,
        "environment": dict(environment),
        "test": {name: result.to_dict() for name, result in results.items()},
        "size_mb": {
            "float": float_size(stored) / 1e6,
            "quantized": execution.size / 1e6,
            "quantized_floats": execution.float_dtype,
        },
        "rtf": real_time_factors(results.values()),
        "speedup": speedup(results.values()),
        "account": account(plan, stored, execution.products),
        "settings": plan.settings,
        "units": _units(plan, layers),
        "layers": layers,
        "histograms": _histograms(plan, histograms),
        "warnings": list(warnings),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "files": _files(execution),
    }
    if effort is not None and "calibration" in effort.utterances:
        report["calibration"] = {
            "num_utterances": effort.utterances["calibration"],
            "drawn_from": drawn_from,
        }
    if plan.search:
        report["search"] = plan.search
    if utterances:
        report["utterances"] = {
            name: worst_utterances(result) for name, result in results.items()
        }
    return report


def _model(name: str | None, stored: Mapping[str, nn.Module]) -> dict:
    # The largest module first: a model without a name is called by it.
    sizes = {k: float_size({k: module}) for k, module in stored.items()}
    keys = sorted(sizes, key=sizes.get, reverse=True)
    return {
        **({"name": name} if name else {}),
        "modules": {k: type(stored[k]).__name__ for k in keys},
        "parameters": float_size(stored) // torch.float32.itemsize,
    }


def _files(execution: Execution) -> dict[str, str]:
    """What a run writes, by what it is."""
    found = {
        "plan": PLAN_FILE,
        "quantized model": f"{MODEL_FOLDER}/{WEIGHTS_FILE}",
    }
    if execution.keys is not None:
        name = f"recognizer, for {execution.interface}"
        found[name] = f"{MODEL_FOLDER}/{HYPERPARAMS_FILE}"
    return found


def _units(plan: QuantizationPlan, layers: list[dict]) -> list[dict]:
    rows = []
    for unit in plan.units:
        own = [x for x in layers if x["unit"] == unit.name]
        row = {"layers": len(own), "bits": sorted({x["bits"] for x in own})}
        for key in ("parameters", "bytes"):
            row[key] = sum(x[key] for x in own)
        rows.append({**asdict(unit), **row})
    return rows


def _layers(
    plan: QuantizationPlan, modules: Mapping[str, nn.Module]
) -> list[dict]:
    """What was decided for each layer; ``bytes``: of its packed weights."""
    sizes, rows = layer_sizes(plan, modules), []
    for layer in plan.layers:
        quant, numel = layer.quant, sizes[layer.name]
        row = {"name": layer.name, "unit": layer.unit, "bits": layer.bits}
        size = numel * (quant.weight_bits if quant else 32) / 8
        row |= {"parameters": numel, "bytes": size, "cutoff": layer.cutoff}
        rows.append({**row, "beyond": layer.beyond, "why": layer.reason})
    return rows


def _histograms(
    plan: QuantizationPlan, histograms: Mapping[str, Histogram]
) -> dict:
    rows = {}
    for layer in plan.layers:
        histogram = histograms.get(layer.name)
        quant = layer.quant
        if histogram is None or quant is None or quant.weight_only:
            continue
        counts = histogram.counts.view(COARSE_BINS, -1).sum(1)
        rows[layer.name] = {
            "unit": layer.unit,
            "range": histogram.range,
            "counts": counts.tolist(),
            "max": histogram.max,
            "cutoff_amax": histogram.quantile(layer.cutoff / 100),
            "amax": quant.largest,
            "beyond": layer.beyond,
        }
    return rows


def write_report(
    report: dict, folder: Path, is_read: Callable[[str], bool] = bool
) -> list[Path]:
    """Writes all files, the JSON first; removes plots of an earlier run.

    ``is_read``: which settings the method reads; others are in the JSON alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The numbers come first: if a plot fails, they are safe.
    written = [write_json(folder / "report.json", report)]
    figures = draw_figures(report, to_png)
    for name, image in figures.items():
        written.append(write_atomic(folder / name, image))
    for name in FIGURES:
        if name not in figures:
            (folder / name).unlink(missing_ok=True)
    drawn = {"markdown": figures, "html": draw_figures(report, to_svg)}
    markdown, html = (
        render(form, "report.jinja", report, figures=figures, is_read=is_read)
        for form, figures in drawn.items()
    )
    for name, text in {"report.md": markdown, "report.html": html}.items():
        written.append(write_atomic(folder / name, text))
    return written


def render_card(
    report: dict, origin: Origin, interface: str, as_data: bool
) -> str:
    """The model card of a report's model.

    ``interface`` is SpeechBrain's class for it; ``as_data``: whether
    ``speechbrain_stablequant.load`` takes it too.
    """
    own = report.get("model", {}).get("name") or "Speech recognizer"
    name = (origin.base_model or own).rpartition("/")[2]
    title = f"{name}, {report['title']}"
    rate = tables.decisive_rate(report)
    return card_header(
        title, origin, rate, report["test"], report["bits"]
    ) + render(
        "markdown",
        "card.jinja",
        report,
        title=title,
        origin=origin,
        interface=interface,
        as_data=as_data,
    )


def render(form: str, template: str, report: dict, **more: Any) -> str:
    """A report in ``markdown`` or ``html``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=form == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = escape_markdown
    environment.globals.update(
        tables=tables, searched=searched, utterances=utterances
    )
    text = environment.get_template(template).render(
        report=report, markup=f"{form}.jinja", **more
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escape_markdown(text: str) -> str:
    """Escape markup, and join lines."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
