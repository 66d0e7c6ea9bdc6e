"""Makes what a run evaluates: its plan, its integers and its folder."""

import time
from collections.abc import Iterable

import speechbrain as sb
from torch import nn

from ..config import QuantizeConfig
from ..core.integer_layer import integer_layer
from ..core.plan import PLAN_FILE
from ..folder.stored_floats import stored_layer
from ..folder.write import write_folder
from ..methods import make_plan
from ..methods.session import Session
from ..model.layers import Layer
from ..runtimes.registry import RUNTIMES
from ..utils import distributed
from ..utils.outputs import Outputs
from ..utils.store import Store
from .dependencies import Dependencies
from .recognizer import BrainRecognizer
from .run import Run
from .trainer import BrainTrainer


class Quantizer:
    """Quantizes the Brain's recognizer as each run says.

    Needs the Brain's checkpoint; ``store`` is shared by all runs.
    """

    def __init__(
        self,
        brain: sb.Brain,
        config: QuantizeConfig,
        store: Store,
        outputs: Outputs,
        trainer: BrainTrainer | None,
        dependencies: Dependencies,
    ):
        self.brain = brain
        self.config = config
        self.store = store
        self.outputs = outputs
        self.trainer = trainer
        self.dependencies = dependencies

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.brain.modules.items())

    def quantize(self, run: Run) -> None:
        """Make the run's plan, integers and folder."""
        started = time.monotonic()
        layers = self._make_plan(run)
        seconds = time.monotonic() - started
        self._convert(run, layers)
        if distributed.is_main():
            self._write_model(run)
        found = distributed.from_main((run.source, run.probe))
        run.source, run.probe = found
        if run.config.plan is None:
            training = run.config.needs_training
            run.remember_effort(seconds, self.trainer.ids if training else ())

    def _session(self, run: Run) -> Session:
        recognizer = BrainRecognizer(
            self.brain,
            run.subsets,
            self.config.metric_attribute,
            distributed.is_main() and not self.brain.noprogressbar,
            self.trainer,
            self.dependencies,
        )
        with self.outputs.writing():
            run.folder.mkdir(parents=True, exist_ok=True)
        # The shared store: variants reuse histograms and evaluations.
        return Session(recognizer, run.config, self.store, RUNTIMES)

    def _make_plan(self, run: Run) -> list[Layer]:
        session = self._session(run)
        run.plan, run.histograms = make_plan(session)
        with self.outputs.writing():
            run.plan.save(run.folder / PLAN_FILE)
        return session.layers

    def _convert(self, run: Run, layers: Iterable[Layer]) -> None:
        """Convert the weights of a plan's layers to integers, on the CPU."""
        quants = run.plan.quants()
        tensors = run.plan.tensors
        decided = {} if tensors is None else tensors.layers
        with run.as_stored(self._modules):
            run.integers = {
                layer.name: stored_layer(
                    integer_layer(
                        layer, quants[layer.name], decided.get(layer.name)
                    ),
                    run.config.float_dtype,
                ).to("cpu")  # Those of all runs are kept.
                for layer in layers
                if layer.name in quants
            }

    def _write_model(self, run: Run) -> None:
        """Write the inference folder; make a probe where there is no folder."""
        with run.adjusted(self._modules), self.outputs.writing():
            run.probe = write_folder(
                run.folder,
                self._modules,
                run.plan,
                run.integers,
                run.config.float_dtype,
                run.source,
            )
        if run.probe is None:
            with run.as_stored(self._modules):
                run.make_probe(self._modules, str(self.brain.device))
