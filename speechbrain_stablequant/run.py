"""One way to quantize a Brain, and what came of it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .adjusted import adjusted_floats
from .checkpoint import PLAN_FILE, rounded_floats
from .config import QuantizeConfig
from .data import Batches
from .files import write_atomic, write_json
from .folder import RecogniserSource, folder_size
from .histogram import Histogram
from .integer import IntegerLayer
from .plan import QuantizationPlan
from .report import comparison_figures, summary_table, write_report
from .results import (
    Effort,
    Execution,
    SetResult,
    build_report,
    comparison,
    comparison_markdown,
    float_size,
)
from .rivals.nncf_ import MODEL_FILE, Rival
from .runtime import build_forwards
from .runtime.base import shadowed_forwards
from .runtime.options import select_options
from .utils.store import Store

# In a run's folder: what its plan took.
EFFORT_FILE = "effort.json"


@dataclass
class Run:
    """One way to quantize, and what came of it.

    Arguments
    ---------
    name : str
        Of the variant; empty without variants.
    config : QuantizeConfig
        The block with the variant's changes.
    folder : Path
        Where its plan, its model and its report are written.
    store : Store
        Of that folder.
    backend : str
        What executes it.
    warnings : list of str
        What a reader of the report should know.
    subsets : dict
        Its calibration and search sets.
    """

    name: str
    config: QuantizeConfig
    folder: Path
    store: Store
    backend: str
    warnings: list[str]
    subsets: dict[str, Batches] = field(default_factory=dict)
    plan: QuantizationPlan | None = None
    integers: dict[str, IntegerLayer] = field(default_factory=dict)
    source: RecogniserSource | None = None
    rival: Rival | None = None
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    results: dict[str, SetResult] = field(default_factory=dict)
    effort: Effort | None = None

    def remember_effort(self, seconds: float, trained: Sequence[str]) -> None:
        """Notes what the plan took, when it was made first.

        Arguments
        ---------
        seconds : float
            How long it took now.
        trained : sequence of str
            Utterances that it was trained on.
        """
        utterances = {
            name: len(subset.ids) for name, subset in self.subsets.items()
        }
        if trained:
            utterances["train"] = len(trained)
        if self.rival is not None:
            key = self.rival.key
        else:
            made = (self.folder / PLAN_FILE).read_bytes()
            key = hashlib.sha256(made).hexdigest()
        effort = Effort(seconds, utterances, self.config.transcribed)
        self.effort = effort.remembered(self.store, EFFORT_FILE, key)

    def adjusted(
        self, modules: Mapping[str, nn.Module]
    ) -> AbstractContextManager[None]:
        """Context in which all that stays float is as the plan changed it."""
        tensors = self.plan.tensors
        floats = {} if tensors is None else tensors.floats
        return adjusted_floats(modules, floats)

    @contextmanager
    def as_stored(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Context in which all that stays float is as the file stores it."""
        with (
            self.adjusted(modules),
            rounded_floats(
                modules, self.plan.quants(), self.config.float_dtype
            ),
        ):
            yield

    def executed(
        self, modules: Mapping[str, nn.Module], device: str
    ) -> AbstractContextManager[None]:
        """Context in which the modules compute by the runtime.

        Arguments
        ---------
        modules : Mapping
            The Brain's modules by key.
        device : str
            Where they are.
        """
        if self.rival is not None:
            return shadowed_forwards(self.rival.forwards())
        forwards = build_forwards(
            self.backend,
            modules,
            {name: x.to(device) for name, x in self.integers.items()},
            **select_options(self.backend, self.config.backend_options),
        )
        return shadowed_forwards(forwards)

    def execution(self) -> Execution:
        """What executes it, for the report."""
        if self.rival is not None:
            keys = tuple(self.rival.chain)
            return Execution(
                self.backend,
                self.config.float_dtype,
                self.rival.size,
                keys,
                {"OpenVINO model": MODEL_FILE},
                self.rival.operations,
            )
        return Execution(
            self.backend,
            self.config.float_dtype,
            folder_size(self.folder),
            None if self.source is None else self.source.keys,
        )

    def write_report(
        self, modules: Mapping[str, nn.Module], environment: Mapping[str, Any]
    ) -> None:
        """Writes the report of all that was evaluated, and prints its table.

        Arguments
        ---------
        modules : Mapping
            The Brain's modules by key.
        environment : Mapping
            What it was measured with.
        """
        report = build_report(
            self.plan,
            self.results,
            modules,
            self.histograms,
            environment,
            execution=self.execution(),
            warnings=self.warnings,
        )
        write_report(report, self.folder)
        for warning in self.warnings:
            print(f"warning: {warning}")
        print(summary_table(report))
        print(f"report: {self.folder / 'report.html'}", flush=True)


def write_comparison(
    runs: Sequence[Run], modules: Mapping[str, nn.Module], folder: Path
) -> None:
    """Writes and prints one table of several runs, with its figures.

    Arguments
    ---------
    runs : sequence of Run
        What was evaluated.
    modules : Mapping
        The Brain's modules by key.
    folder : Path
        Where to.
    """
    executions = {run.name: run.execution() for run in runs}
    for execution in executions.values():
        if execution.keys is not None:
            modules = {key: modules[key] for key in execution.keys}
            break
    table = comparison(
        {run.name: (run.plan, run.results) for run in runs},
        executions,
        float_size(modules) / 1e6,
        {run.name: run.effort for run in runs if run.effort},
    )
    write_json(folder / "comparison.json", table)
    for name, image in comparison_figures(table).items():
        write_atomic(folder / name, image)
    text = comparison_markdown(table)
    path = write_atomic(folder / "comparison.md", text)
    print(text)
    print(f"comparison: {path}", flush=True)
