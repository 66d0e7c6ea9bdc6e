"""Gathers what a run measured into the dictionary of ``report.json``."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..brain.decoding import as_scored, rows_of, same_text
from ..brain.recognizer import ForwardClock, transcripts_of
from ..core.error_rates import (
    Transcript,
    bootstrap_delta_wer,
    real_time_factor,
    score,
    size_on_disk,
)
from ..core.histogram import Histogram
from ..core.plan import QuantizationPlan
from ..folder.weights_file import PLAN_FILE, WEIGHTS_FILE
from ..folder.write import HYPERPARAMS_FILE
from ..runtimes.cpu import cpu_class
from ..utils import distributed
from ..utils.files import identity
from ..utils.precision import allows_tf32
from ..utils.store import Store
from ..utils.typed import typed

FLOAT_BITS = 32
# By the names that SpeechBrain has for them.
_ARITHMETIC = {
    "fp32": "float32",
    "fp16": "autocast to float16",
    "bf16": "autocast to bfloat16",
}
_TF32 = ("products", "convolutions")
# Bars of a histogram in the report.
COARSE_BINS = 128


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one test set.

    Arguments
    ---------
    transcripts : sequence of Transcript
        In the order of the loader.
    seconds : float
        Time that it took to recognize.
    audio_seconds : float
        Audio in the set.
    folder : sequence of Transcript
        What the inference folder transcribes from the same outputs, where it
        decodes otherwise than the recipe.
    audio : str
        Identifies the audio, and how it was put into batches.
    """

    transcripts: Sequence[Transcript]
    seconds: float
    audio_seconds: float
    folder: tuple[Transcript, ...] = ()
    audio: str = ""

    @classmethod
    def of(
        cls,
        metric: Any,
        clock: ForwardClock,
        texts: Sequence[tuple[str, ...]] = (),
    ) -> "Evaluation":
        """What a metric and a clock have collected, and what the folder's
        decoder has heard of the same utterances."""
        transcripts, rows = transcripts_of(metric), rows_of(metric.scores)
        folder = ()
        if len(texts) == len(rows) and not same_text(rows, texts):
            pairs = zip(transcripts, as_scored(rows, texts), strict=True)
            folder = tuple(replace(t, hypothesis=text) for t, text in pairs)
        return cls(
            transcripts,
            clock.seconds,
            clock.audio_seconds,
            folder,
            clock.audio_digest,
        )

    def key(self, plan: QuantizationPlan, *execution: Any) -> str:
        """Identifies the quantized evaluation of the same batches.

        What the float model heard counts as well: it shows changes that
        nobody else sees.

        Arguments
        ---------
        plan : QuantizationPlan
            What is evaluated.
        *execution
            How it is executed: anything that JSON holds.

        Returns
        -------
        str
            32 hexadecimal digits.
        """
        heard = [asdict(transcript) for transcript in self.transcripts]
        quants = {n: q.to_dict() for n, q in plan.quants().items()}
        content = [plan.fingerprint, quants, self.audio, heard, execution]
        if plan.tensors:
            content.append(plan.tensors.digest())
        return identity(content)

    def write(self, store: Store, file: str, key: str) -> None:
        """Keeps the evaluation for a run that is started again."""
        store.write(file, key, asdict(self))

    @classmethod
    def read(cls, store: Store, file: str, key: str) -> "Evaluation | None":
        """What :meth:`write` kept, if it is about the same evaluation."""
        return store.read(
            file, key, "transcripts", lambda raw: typed(raw, cls, "content")
        )


@dataclass(frozen=True)
class Effort:
    """What a plan took.

    Arguments
    ---------
    seconds : float
        Time to make it. What variants share (calibration, evaluations) took
        the time of the first one; a run that was killed is not counted.
    utterances : Mapping
        How many, by ``calibration``, ``search`` and ``train``, as far as they
        were used.
    transcribed : sequence of str
        The sets whose transcripts decided something.

    Example
    -------
    >>> Effort(61.4, {"calibration": 40, "search": 12}, ["search"]).data()
    'calibration 40, search 12 with transcripts'
    """

    seconds: float
    utterances: Mapping[str, int]
    transcribed: Sequence[str] = ()

    def data(self) -> str:
        """The sets in words."""
        return ", ".join(
            f"{name} {count}"
            + (" with transcripts" if name in self.transcribed else "")
            for name, count in self.utterances.items()
        )

    def remembered(self, store: Store, file: str, key: str) -> "Effort":
        """This one, or the one of the run that made the same plan first.

        Arguments
        ---------
        store : Store
            Where the file is.
        file : str
            Its name.
        key : str
            Identifies the plan.

        Returns
        -------
        Effort
        """
        known = store.read(
            file,
            key,
            "effort of a plan",
            lambda raw: typed(raw, Effort, "content"),
        )
        if known is not None:
            return known
        store.write(file, key, asdict(self))
        return self


@dataclass(frozen=True)
class Execution:
    """What was evaluated as the quantized model.

    Arguments
    ---------
    backend : str
        The runtime; ``torch`` is the simulation.
    float_dtype : str
        How all that is not quantized is stored.
    size : int
        Bytes of ``model.safetensors``.
    keys : sequence of str or None
        Modules that it holds; None for all.
    files : Mapping or None
        Its files by what they are; None for those of an inference folder.
    operations : Mapping or None
        How many products are computed with ``integer`` and with ``float``
        arithmetic, where that is not what the plan says.
    """

    backend: str
    float_dtype: str
    size: int
    keys: Sequence[str] | None = None
    files: Mapping[str, str] | None = None
    operations: Mapping[str, int] | None = None

    def list_files(self) -> dict[str, str]:
        """Its files, for the report."""
        if self.files is not None:
            return dict(self.files)
        files = {"plan": PLAN_FILE, "quantized model": WEIGHTS_FILE}
        if self.keys is not None:
            files["recognizer, for EncoderASR"] = HYPERPARAMS_FILE
        return files


@dataclass(frozen=True)
class SetResult:
    """Both evaluations of one test set, over the same utterances in order."""

    baseline: Evaluation
    quantized: Evaluation

    @classmethod
    def pair(cls, baseline: Evaluation, quantized: Evaluation) -> "SetResult":
        """Brings the quantized evaluation into the order of the float one.

        Arguments
        ---------
        baseline, quantized : Evaluation
            Of the same utterances, in any order.

        Returns
        -------
        SetResult

        Raises
        ------
        ValueError
            The two evaluations are about different utterances.
        """
        by_id = {item.id: item for item in quantized.transcripts}
        ids = [item.id for item in baseline.transcripts]
        missing = [name for name in ids if name not in by_id]
        if missing or len(by_id) != len(ids):
            raise ValueError(
                "test set: the float and the quantized evaluation differ in "
                f"their utterances ({', '.join(missing[:3]) or 'more ran'}); "
                "the test loader must give the same set each time"
            )
        ordered = [by_id[name] for name in ids]
        by_id = {item.id: item for item in quantized.folder}
        folder = tuple(by_id[name] for name in ids) if by_id else ()
        return cls(
            baseline, replace(quantized, transcripts=ordered, folder=folder)
        )

    def to_dict(self) -> dict:
        """The set's part of ``report.json``."""
        before = self.baseline.transcripts
        after = self.quantized.transcripts
        wer = bootstrap_delta_wer(before, after)
        cer = bootstrap_delta_wer(before, after, unit="char")
        row = {
            "float": score(before).to_dict(),
            "quantized": score(after).to_dict(),
            "delta_wer": wer.delta,
            "delta_wer_ci": [wer.low, wer.high],
            "delta_cer": cer.delta,
            "delta_cer_ci": [cer.low, cer.high],
        }
        if self.baseline.folder or self.quantized.folder:
            # Where one of them has none, it decodes as the recipe does.
            row["folder"] = {
                "float": score(self.baseline.folder or before).to_dict(),
                "quantized": score(self.quantized.folder or after).to_dict(),
            }
        return row


def float_size(modules: Mapping[str, nn.Module]) -> int:
    """Bytes of a float model on disk.

    Arguments
    ---------
    modules : Mapping
        The modules of the recognizer by key.

    Returns
    -------
    int
        Every parameter once, as float32.

    Example
    -------
    >>> float_size({"enc": nn.Linear(3, 2)})
    32
    """
    counts = {
        id(parameter): parameter.numel()
        for module in modules.values()
        for parameter in module.parameters()
    }
    return size_on_disk((count, FLOAT_BITS) for count in counts.values())


def environment(
    device: str, precision: str | None = None
) -> dict[str, str | int]:
    """What the figures were measured with.

    Arguments
    ---------
    device : str
        The Brain's device.
    precision : str, optional
        Its ``eval_precision``; float32 by default.

    Returns
    -------
    dict

    Example
    -------
    >>> environment("cpu", "bf16")["float arithmetic"]
    'autocast to bfloat16'
    """
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "speechbrain": version("speechbrain"),
        "cpu": _cpu_name(),
        "cpu class": cpu_class().name,
        "threads": torch.get_num_threads(),
        "device": (
            torch.cuda.get_device_name(device)
            if device.startswith("cuda")
            else device
        ),
        "processes": distributed.size(),
        "float arithmetic": _ARITHMETIC[precision or "fp32"],
    }
    if device.startswith("cuda"):
        allowed = zip(_TF32, allows_tf32(), strict=True)
        found["TF32"] = " and ".join(n for n, yes in allowed if yes) or "off"
        found["CUDA"] = str(torch.version.cuda)
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def build_report(
    plan: QuantizationPlan,
    results: Mapping[str, SetResult],
    modules: Mapping[str, nn.Module],
    histograms: Mapping[str, Histogram],
    environment: Mapping[str, Any],
    execution: Execution,
    warnings: Sequence[str] = (),
) -> dict:
    """Everything that ``report.json`` holds.

    Arguments
    ---------
    plan : QuantizationPlan
        What was decided.
    results : Mapping
        Both evaluations by test set.
    modules : Mapping
        All modules of the recognizer by key.
    histograms : Mapping
        Histograms by layer name; empty for a plan that was given.
    environment : Mapping
        From :func:`environment`.
    execution : Execution
        What was evaluated, and its size on disk.
    warnings : sequence of str
        What a reader should know.

    Returns
    -------
    dict
        See :mod:`speechbrain_stablequant.report.schema`.
    """
    stored = {
        key: modules[key]
        for key in (modules if execution.keys is None else execution.keys)
    }
    report = {
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "title": f"W{plan.weight_bits}A{plan.activation_bits} {plan.method}",
        "method": plan.method,
        "bits": {
            "weight": plan.weight_bits,
            "activation": plan.activation_bits,
        },
        "backend": (
            "simulated" if execution.backend == "torch" else execution.backend
        ),
        "environment": dict(environment),
        "test": {name: result.to_dict() for name, result in results.items()},
        "size_mb": {
            "float": float_size(stored) / 1e6,
            "quantized": execution.size / 1e6,
            "quantized_floats": execution.float_dtype,
        },
        "rtf": _speeds(results.values()),
        "units": _units(plan, modules),
        "histograms": _histograms(plan, histograms),
        "warnings": list(warnings),
        "files": execution.list_files(),
    }
    if plan.search:
        report["search"] = plan.search
    return report


def _speeds(results: Iterable[SetResult]) -> dict[str, float]:
    """Real-time factors over all sets."""
    pairs = {
        "float": [result.baseline for result in results],
        "quantized": [result.quantized for result in results],
    }
    return {
        name: real_time_factor(
            sum(e.seconds for e in evaluations),
            sum(e.audio_seconds for e in evaluations),
        )
        for name, evaluations in pairs.items()
    }


def _units(
    plan: QuantizationPlan, modules: Mapping[str, nn.Module]
) -> list[dict]:
    numels = {
        f"{key}.{name}" if name else key: child.weight.numel()
        for key, module in modules.items()
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear | nn.Conv1d)
    }
    rows = []
    for unit in plan.units:
        names = [x.name for x in plan.layers if x.unit == unit.name]
        rows.append(
            {
                **asdict(unit),
                "layers": len(names),
                "parameters": sum(numels[name] for name in names),
            }
        )
    return rows


def _histograms(
    plan: QuantizationPlan, histograms: Mapping[str, Histogram]
) -> dict:
    rows = {}
    for layer in plan.layers:
        histogram = histograms.get(layer.name)
        if histogram is None or layer.quant is None:
            continue
        counts = histogram.counts.view(COARSE_BINS, -1).sum(1)
        rows[layer.name] = {
            "unit": layer.unit,
            "range": histogram.range,
            "counts": counts.tolist(),
            "max": histogram.max,
            "cutoff_amax": histogram.quantile(layer.cutoff / 100),
            "amax": layer.quant.activation_amax,
        }
    return rows


def comparison(
    runs: Mapping[str, tuple[QuantizationPlan, Mapping[str, SetResult]]],
    executions: Mapping[str, Execution] | None = None,
    float_mb: float | None = None,
    efforts: Mapping[str, Effort] | None = None,
) -> dict:
    """One row for each variant and test set.

    Arguments
    ---------
    runs : Mapping
        Plan and results by the variant's name.
    executions : Mapping, optional
        What was evaluated, and its size on disk, by the variant's name.
    float_mb : float, optional
        Size of the float32 model.
    efforts : Mapping, optional
        What each plan took, by the variant's name.

    Returns
    -------
    dict
        ``{"rows": [...]}`` with rates in percent.
    """
    rows = []
    for name, (plan, results) in runs.items():
        for set_name, result in results.items():
            rows.append(
                {
                    "variant": name,
                    "method": plan.method,
                    "weight_bits": plan.weight_bits,
                    "activation_bits": plan.activation_bits,
                    "set": set_name,
                    **result.to_dict(),
                }
            )
            if executions is not None:
                execution = executions[name]
                rows[-1]["size_mb"] = execution.size / 1e6
                rows[-1]["backend"] = execution.backend
                rows[-1]["rtf"] = _speeds([result])
                if execution.operations is not None:
                    rows[-1]["operations"] = dict(execution.operations)
            if efforts is not None and name in efforts:
                rows[-1]["effort"] = asdict(efforts[name])
    table = {"rows": rows}
    if float_mb is not None:
        table["float_mb"] = float_mb
    return table


def comparison_markdown(table: Mapping[str, list]) -> str:
    """The comparison as a Markdown table.

    Arguments
    ---------
    table : Mapping
        From :func:`comparison`.

    Returns
    -------
    str
    """
    rows = table["rows"]
    columns = ["MB", "RTF"] if all("size_mb" in row for row in rows) else []
    if any("operations" in row for row in rows):
        columns.append("float products")
    if any("effort" in row for row in rows):
        columns += ["made in", "utterances used"]
    head = "| set | variant | WER % | change | 95 % interval | CER % | change |"
    lines = [
        head + "".join(f" {column} |" for column in columns),
        "|---|---|---|---|---|---|---|" + "---|" * len(columns),
    ]
    seen = set()
    for row in rows:
        if row["set"] not in seen:
            seen.add(row["set"])
            rates = row["float"]
            lines.append(
                f"| {row['set']} | float | {rates['WER']:.2f} | | | "
                f"{rates['CER']:.2f} | |"
                + _float_cells(row, table.get("float_mb"), columns)
            )
        rates = row["quantized"]
        low, high = row["delta_wer_ci"]
        lines.append(
            f"| {row['set']} | {row['variant']} | {rates['WER']:.2f} | "
            f"{row['delta_wer']:+.2f} | {low:+.2f} to {high:+.2f} | "
            f"{rates['CER']:.2f} | {row['delta_cer']:+.2f} |"
            + _cells(row, columns)
        )
    return "\n".join(lines) + "\n"


def _float_cells(
    row: Mapping, size: float | None, columns: Sequence[str]
) -> str:
    values = {
        "MB": None if size is None else f"{size:.1f}",
        "RTF": f"{row['rtf']['float']:.3f}" if "rtf" in row else None,
    }
    return _joined(values.get(column) for column in columns)


def _cells(row: Mapping, columns: Sequence[str]) -> str:
    values = {}
    if "size_mb" in row:
        values["MB"] = f"{row['size_mb']:.1f}"
        # Of a simulation it says nothing.
        if row["backend"] != "torch":
            values["RTF"] = f"{row['rtf']['quantized']:.3f}"
    if "operations" in row:
        count = row["operations"]
        total = count["float"] + count["integer"]
        values["float products"] = f"{count['float']} of {total}"
    if "effort" in row:
        effort = Effort(**row["effort"])
        values["made in"] = f"{effort.seconds:.0f} s"
        values["utterances used"] = effort.data()
    return _joined(values.get(column) for column in columns)


def _joined(cells: Iterable[str | None]) -> str:
    return "".join(" |" if cell is None else f" {cell} |" for cell in cells)
