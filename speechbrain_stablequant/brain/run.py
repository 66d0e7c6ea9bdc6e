"""A run: one variant of the block with its runtime, results and report."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import QuantizeConfig
from ..core.histogram import Histogram
from ..core.integer_layer import IntegerLayer
from ..core.plan import QuantizationPlan
from ..core.plan_tensors import adjusted_floats
from ..folder.stored_floats import rounded_floats
from ..folder.write import RecognizerSource, folder_size
from ..model.layers import Layer, find_encoders
from ..report import summary_table, write_report
from ..report.build import build_report, float_size
from ..report.comparison import variant_rows, write_comparison
from ..report.results import Effort, Execution, SetResult
from ..runtimes.base import shadowed_forwards
from ..runtimes.build import build_forwards
from ..runtimes.choice import (
    candidates,
    executed_form,
    first_right,
    prove,
)
from ..runtimes.options import select_options
from ..runtimes.probe import Probe
from ..runtimes.probe_measure import encoder_probe
from ..runtimes.probe_networks import (
    Compute,
    chain,
    encoder_alone,
    evaluating,
    quick_integers,
)
from ..runtimes.registry import RUNTIMES
from ..utils import distributed
from ..utils.files import identity
from ..utils.outputs import Outputs
from ..utils.store import Store
from .data import Batches
from .preflight import seven_bits_notes

# File in a run's folder.
EFFORT_FILE = "effort.json"


@dataclass
class Run:
    """One variant of a block, and its results."""

    #: Empty without variants.
    name: str
    config: QuantizeConfig
    folder: Path
    #: Of that folder.
    store: Store
    #: The runtime that executes the plan.
    backend: str
    #: For the readers of the report.
    warnings: list[str]
    #: The calibration and search sets.
    subsets: dict[str, Batches] = field(default_factory=dict)
    plan: QuantizationPlan | None = None
    integers: dict[str, IntegerLayer] = field(default_factory=dict)
    source: RecognizerSource | None = None
    probe: Probe | None = None
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    results: dict[str, SetResult] = field(default_factory=dict)
    effort: Effort | None = None

    def remember_effort(self, seconds: float, trained: Sequence[str]) -> None:
        """Keep what the plan took when it was first made.

        ``trained``: utterances that it was trained on.
        """
        utterances = {
            name: len(subset.ids) for name, subset in self.subsets.items()
        }
        if trained:
            utterances["train"] = len(trained)
        effort = Effort(seconds, utterances, self.config.transcribed)
        self.effort = effort.remembered(
            self.store, EFFORT_FILE, self._plan_key()
        )

    def _plan_key(self) -> str:
        plan = self.plan
        quants = {name: q.to_dict() for name, q in plan.quants().items()}
        content = [plan.fingerprint, plan.settings, plan.search, quants]
        if plan.tensors:
            content.append(plan.tensors.digest())
        return identity(content)

    def adjusted(
        self, modules: Mapping[str, nn.Module]
    ) -> AbstractContextManager[None]:
        """Apply the plan's changes to the parameters that stay float."""
        tensors = self.plan.tensors
        floats = {} if tensors is None else tensors.floats
        return adjusted_floats(modules, floats)

    @contextmanager
    def as_stored(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Round the parameters that stay float, as the file stores them."""
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
        """Execute the modules by the first runtime that passes its probe."""
        forwards, _ = self._first_right(
            modules, self.integers, self.probe, self._network, device
        )
        return shadowed_forwards(forwards)

    def try_runtime(
        self,
        modules: Mapping[str, nn.Module],
        layers: Iterable[Layer],
        device: str,
    ) -> list[str]:
        """Check the runtime before there is a plan, on a MAX-quantized encoder.

        Returns why earlier runtimes were rejected; a runtime that the block
        names raises a ProbeError instead.
        """
        encoders = find_encoders(modules)
        layerwise = RUNTIMES[self.backend].encoder is None
        if layerwise or not encoders:
            return []
        encoder, config = encoders[0], self.config
        alone = {encoder.path: encoder.model}
        bits = (config.weight_bits, config.activation_bits)
        with evaluating(alone):
            integers = quick_integers(
                encoder, layers, bits, config.sample_rate, device
            )
            probe = encoder_probe(
                encoder,
                integers,
                config.sample_rate,
                device,
                [executed_form(self.backend)],
            )

        def network(modules: Mapping, forwards: Mapping) -> Compute:
            return encoder_alone(encoder.model, forwards)

        _, reasons = self._first_right(alone, integers, probe, network, device)
        return reasons

    def _first_right(
        self,
        modules: Mapping[str, nn.Module],
        integers: Mapping[str, IntegerLayer],
        probe: Probe | None,
        network: Callable[[Mapping, Mapping], Compute],
        device: str,
    ) -> tuple[dict[nn.Module, Callable[..., Any]], list[str]]:
        """Forwards of the first runtime that passes the probe, which becomes
        the run's, and why those before it were rejected."""
        integers = {name: x.to(device) for name, x in integers.items()}
        place = torch.device(device)

        def attempt(name: str) -> tuple[str, dict[nn.Module, Callable]]:
            forwards = build_forwards(
                name,
                modules,
                integers,
                **select_options(name, self.config.backend_options),
            )
            if probe is not None:
                with evaluating(modules):
                    prove(name, probe, network(modules, forwards), place)
            return name, forwards

        names = candidates(self.config.backend, device)
        # Processes on other machines may have rejected more runtimes.
        start = max(distributed.gathered(names.index(self.backend)))
        (chosen, forwards), reasons = first_right(
            names[start:], distributed.together(attempt), device
        )
        self.change_runtime(chosen, reasons)
        return forwards, reasons

    def change_runtime(self, chosen: str, reasons: Sequence[str]) -> None:
        """Change the runtime, and report why others were rejected."""
        if chosen != self.backend:
            before = seven_bits_notes(self.backend, self.config)
            kept = [text for text in self.warnings if text not in before]
            self.warnings[:] = kept + seven_bits_notes(chosen, self.config)
            self.backend = chosen
        self.warnings += [f"Not executed by {reason}." for reason in reasons]

    def make_probe(self, modules: Mapping[str, nn.Module], device: str) -> None:
        """Make a probe of the encoder alone, where there is no folder."""
        for encoder in find_encoders(modules)[:1]:
            with evaluating(modules):
                self.probe = encoder_probe(
                    encoder, self.integers, self.config.sample_rate, device
                )

    def _network(
        self,
        modules: Mapping[str, nn.Module],
        forwards: Mapping[nn.Module, Callable],
    ) -> Compute:
        """The modules that the probe covers, as a runtime computes them."""
        if self.source is None:
            return encoder_alone(find_encoders(modules)[0].model, forwards)
        parts = {key: modules[key] for key in self.source.keys}
        return chain(parts, self.source.encoder["use_lengths"], forwards)

    def execution(self) -> Execution:
        """What was evaluated, for the report."""
        return Execution(
            self.backend,
            self.config.float_dtype,
            folder_size(self.folder),
            None if self.source is None else self.source.keys,
        )

    def write_report(
        self,
        modules: Mapping[str, nn.Module],
        environment: Mapping[str, Any],
        outputs: Outputs,
    ) -> None:
        """Write the report, and print its summary."""
        with outputs.writing():
            report = build_report(
                self.plan,
                self.results,
                modules,
                self.histograms,
                environment,
                execution=self.execution(),
                warnings=self.warnings,
            )
            # Print results before writing: the disk may be full.
            for warning in self.warnings:
                print(f"warning: {warning}")
            print(summary_table(report), flush=True)
            write_report(report, self.folder)
            print(f"report: {self.folder / 'report.html'}", flush=True)
            return
        # Reached if the report could not be made: its main figures at least.
        for name, result in self.results.items():
            rates = result.to_dict()
            print(
                f"{name}: WER {rates['float']['WER']:.2f} % float, "
                f"{rates['quantized']['WER']:.2f} % quantized",
                flush=True,
            )


def compare(
    runs: Sequence[Run], modules: Mapping[str, nn.Module], folder: Path
) -> None:
    """Write and print the comparison of several runs, with its figures."""
    rows = []
    stored = None
    for run in runs:
        plan, execution = run.plan, run.execution()
        stored = stored or execution.keys
        how = (plan.method, plan.weight_bits, plan.activation_bits)
        rows += variant_rows(run.name, how, run.results, execution, run.effort)
    if stored is not None:
        modules = {key: modules[key] for key in stored}
    table = {"rows": rows, "float_mb": float_size(modules) / 1e6}
    write_comparison(table, folder)
