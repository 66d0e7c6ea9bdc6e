"""A run: one variant of the block, and what is made and measured of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import speechbrain as sb
from torch import nn

from ..core.float_reason import weights_alone
from ..core.histogram import Histogram
from ..core.integer_layer import IntegerLayer
from ..core.parts import Part
from ..core.plan import QuantizationPlan
from ..core.plan_tensors import adjusted_floats
from ..core.quantize_layer import integer_layer
from ..folder.card import CARD_FILE, Origin
from ..folder.recognizer_spec import (
    HYPERPARAMS_FILE,
    RECOGNIZER_FILE,
    RecognizerSource,
)
from ..folder.stored_floats import (
    rounded_floats,
    rounded_weights,
    stored_layer,
)
from ..folder.weights_file import MODEL_FOLDER, WEIGHTS_FILE
from ..folder.write import ModulesSource, write_folder
from ..methods.registry import QuantizeConfig, read_by
from ..model.layer import Layer
from ..model.layers import find_layers
from ..report.build import build_report, float_size, render_card, write_report
from ..report.comparison import variant_rows
from ..report.results import Effort, Execution, SetResult, plan_key
from ..report.tables import summary_table
from ..runtimes.probe import Probe
from ..runtimes.registry import RUNTIMES
from ..utils.files import Outputs, remove_stale, write_atomic
from ..utils.store import Store
from .data import Batches, drawn_from

# File in a run's folder.
EFFORT_FILE = "effort.json"


@dataclass(eq=False)
class Run:
    """One variant of a block, and its results."""

    brain: sb.Brain
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
    origin: Origin | None = None
    #: The calibration and search sets.
    subsets: dict[str, Batches] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    plan: QuantizationPlan | None = None
    integers: dict[str, IntegerLayer] = field(default_factory=dict)
    source: RecognizerSource | ModulesSource | None = None
    #: Modules of the folder that are not the Brain's, such as a language model.
    extras: dict[str, nn.Module] = field(default_factory=dict)
    probe: Probe | None = None
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    #: Multiply-adds of one batch, see ``core.account``.
    products: Mapping[str, int] | None = None
    results: dict[str, SetResult] = field(default_factory=dict)
    effort: Effort | None = None
    #: Whether plan, integers and folder are there.
    is_quantized: bool = False

    @property
    def model_folder(self) -> Path:
        """The inference folder: what can be uploaded, and nothing else."""
        return self.folder / MODEL_FOLDER

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The Brain's modules by key."""
        return dict(self.brain.modules.items())

    @property
    def stored_modules(self) -> dict[str, nn.Module]:
        """The Brain's modules, and others that the folder holds, by name."""
        return {**self.modules, **self.extras}

    @property
    def device(self) -> str:
        """The Brain's device."""
        return str(self.brain.device)

    @property
    def layers(self) -> list[Layer]:
        """The layers that the block selects."""
        config = self.config
        return find_layers(
            self.modules, config.target, config.include, config.exclude
        )

    @property
    def weights_alone(self) -> dict[str, str]:
        """Layers whose weights alone are quantized, with the reason."""
        return weights_alone(self.parts, self.layers)

    def adjusted(self) -> AbstractContextManager[None]:
        """Apply the plan's changes to the parameters that stay float."""
        tensors = self.plan.tensors
        floats = {} if tensors is None else tensors.floats
        return adjusted_floats(self.modules, floats)

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Round the parameters that are multiplied in floating point, as the
        file stores them."""
        quants, dtype = self.plan.quants(), self.config.float_dtype
        modules, only = self.stored_modules, self.plan.weight_only
        with (
            self.adjusted(),
            rounded_floats(modules, quants, dtype, only),
            rounded_weights(self.modules, self.integers),
        ):
            yield

    def convert(self, layers: Iterable[Layer]) -> None:
        """Convert the weights of the plan's layers to integers, on the CPU."""
        quants, tensors = self.plan.quants(), self.plan.tensors
        decided = {} if tensors is None else tensors.layers
        with self.as_stored():
            self.integers = {
                layer.name: stored_layer(
                    integer_layer(
                        layer, quants[layer.name], decided.get(layer.name)
                    ),
                    self.config.float_dtype,
                ).to("cpu")  # Those of all runs are kept.
                for layer in layers
                if layer.name in quants
            }

    def write_folder(self) -> None:
        """Write the inference folder, with a probe where it is complete."""
        self.model_folder.mkdir(exist_ok=True)
        (self.model_folder / CARD_FILE).unlink(missing_ok=True)
        remove_stale(self.model_folder)
        with self.adjusted():
            self.probe = write_folder(
                self.model_folder,
                self.stored_modules,
                self.plan,
                self.integers,
                self.config.float_dtype,
                self.source,
            )
        # Earlier versions wrote the model beside the report.
        for name in (WEIGHTS_FILE, HYPERPARAMS_FILE, RECOGNIZER_FILE):
            (self.folder / name).unlink(missing_ok=True)

    def remember_effort(self, seconds: float, trained: Sequence[str]) -> None:
        """Keep what making the plan took; ``trained``: utterances it used."""
        utterances = {name: len(x.ids) for name, x in self.subsets.items()}
        if trained:
            utterances["train"] = len(trained)
        key = plan_key(self.plan, self.plan.settings, self.plan.search)
        effort = Effort(seconds, utterances, self.config.transcribed)
        self.effort = effort.remembered(self.store, EFFORT_FILE, key)

    def execution(self) -> Execution:
        """What was evaluated, for the report."""
        return Execution(
            self.backend,
            self.config.float_dtype,
            (self.model_folder / WEIGHTS_FILE).stat().st_size,
            None if self.source is None else self.source.keys,
            RUNTIMES[self.backend].simulates,
            getattr(self.source, "interface", "EncoderASR"),
            self.products,
        )

    def write_report(
        self, environment: Mapping[str, Any], outputs: Outputs
    ) -> bool:
        """Write the report, and print its summary; whether it could be
        made."""
        origin = self.origin or _origin(self.modules)
        with outputs.writing():
            report = build_report(
                self.plan,
                self.results,
                self.stored_modules,
                self.histograms,
                environment,
                effort=self.effort,
                execution=self.execution(),
                warnings=self.warnings,
                name=origin.base_model,
                utterances=self.config.report.utterances,
                drawn_from=drawn_from(self.brain),
            )
            # Print results before writing: the disk may be full.
            for warning in self.warnings:
                print(f"warning: {warning}")
            print(summary_table(report), flush=True)
            write_report(report, self.folder, read_by(self.plan.method))
            self._write_card(report, origin)
            print(f"report: {self.folder / 'report.html'}", flush=True)
            return True
        # Reached if the report could not be made: its main figures at least.
        for name, result in self.results.items():
            rates = result.to_dict()
            print(
                f"{name}: {rates['rate']} {rates['float']['WER']:.2f} % float, "
                f"{rates['quantized']['WER']:.2f} % quantized",
                flush=True,
            )
        return False

    def _write_card(self, report: dict, origin: Origin) -> None:
        """Write the card of a folder that loads."""
        if self.source is None:
            return
        as_data = (self.model_folder / RECOGNIZER_FILE).is_file()
        interface = self.execution().interface
        card = render_card(report, origin, interface, as_data)
        write_atomic(self.model_folder / CARD_FILE, card)


def _origin(modules: Mapping[str, nn.Module]) -> Origin:
    """Of the first HuggingFace model among a recipe's modules."""
    for module in modules.values():
        config = getattr(getattr(module, "model", None), "config", None)
        source = getattr(config, "_name_or_path", None)
        if source:
            return Origin.of(source)
    return Origin()


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """The table that compares runs, see ``report.comparison``."""
    rows, stored = [], None
    for run in runs:
        plan, execution = run.plan, run.execution()
        if stored is None and execution.keys is not None:
            stored = {key: run.stored_modules[key] for key in execution.keys}
        how = (plan.method, plan.weight_bits, plan.activation_bits)
        rows += variant_rows(run.name, how, run.results, execution, run.effort)
    if stored is None:
        stored = runs[0].stored_modules
    return {"rows": rows, "float_mb": float_size(stored) / 1e6}
