"""The epochs of quantization-aware training, and which one is kept."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ...core.plan_tensors import AdjustedTensors
from ..search.score import Score
from ..session.trainer import Optimizers, Trainer
from .store import EpochStore
from .student import Quants, Student

Measure = Callable[[Quants, AdjustedTensors], Score]


@dataclass(frozen=True)
class Training:
    """Schedule of a training; options as in ``quantize.qat``.

    ``keep="best"`` keeps the epoch with the fewest errors, then the least
    loss, the calibrated model included.
    """

    epochs: int
    lr: float
    scale_lr: float = 1e-3
    distill: float = 0.0
    keep: str = "best"

    def kept(self, history: list[dict]) -> dict:
        """Entry of the epoch that is kept."""
        if self.keep == "last":
            return history[-1]

        def rank(entry: dict) -> tuple:
            loss = entry["valid_loss"]
            return entry["errors"], math.inf if loss is None else loss

        return min(history, key=rank)

    def optimizers(self, student: Student) -> dict[str, torch.optim.Optimizer]:
        """One Adam for weights and one for scales if they learn."""
        groups = {
            "weights": (student.weights, self.lr),
            "scales": (student.scales, self.scale_lr),
        }
        return {
            name: torch.optim.Adam(parameters.values(), lr=rate)
            for name, (parameters, rate) in groups.items()
            if parameters
        }

    def set_rates(self, optimizers: Optimizers, progress: float) -> None:
        """Half a cosine from the full rates at 0 down to none at 1."""
        factor = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        rates = {"weights": self.lr, "scales": self.scale_lr}
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * factor

    def run(
        self,
        student: Student,
        trainer: Trainer,
        measure: Measure,
        store: EpochStore,
        on_batch: Callable[[int, int], None] = lambda epoch, index: None,
        on_epoch: Callable[[dict], None] = lambda entry: None,
    ) -> tuple[Quants, AdjustedTensors, list[dict]]:
        """Trains, or resumes a killed training.

        Arguments
        ---------
        student : Student
            The calibrated model.
        trainer : Trainer
            The loop and its data.
        measure : callable
            Scores a result; not called with ``keep="last"``.
        store : EpochStore
            Finished epochs.
        on_batch : callable
            Called before each batch with the epoch and the batch's index.
        on_epoch : callable
            Called with the entry of each finished epoch.

        Returns
        -------
        dict
            LayerQuant by name.
        AdjustedTensors
            Their tensors.
        list of dict
            ``{"epoch", "loss", "wer", "errors", "valid_loss"}``; what was not
            measured is None, as is the loss of epoch 0.
        """
        known = store.finished()
        if known is not None:
            return known
        optimizers = self.optimizers(student)
        saved = store.read()
        history: list[dict] = []
        if saved is not None:
            tensors, history = saved
            student.load(tensors)
            _load_optimizers(optimizers, tensors)
        for number in range(len(history), self.epochs + 1):
            loss = None
            if number:
                with student.active():
                    loss = trainer.epoch(
                        number,
                        optimizers,
                        partial(
                            self._before, number, trainer, optimizers, on_batch
                        ),
                        self.distill,
                        student.resting,
                    )
            history.append(self._entry(number, loss, student, measure))
            on_epoch(history[-1])
            state = {**student.parameters, **_state_of(optimizers)}
            store.write(state, history, self.kept(history)["epoch"])
        best = self.kept(history)["epoch"]
        if best != history[-1]["epoch"]:
            student.load(store.read(best)[0])
        quants, tensors = student.result()
        store.finish(quants, tensors, history)
        return quants, tensors, history

    def _before(
        self,
        number: int,
        trainer: Trainer,
        optimizers: Optimizers,
        on_batch: Callable[[int, int], None],
        index: int,
    ) -> None:
        done = number - 1 + index / len(trainer)
        self.set_rates(optimizers, done / self.epochs)
        on_batch(number, index)

    def _entry(
        self,
        number: int,
        loss: float | None,
        student: Student,
        measure: Measure,
    ) -> dict:
        entry = {"epoch": number, "loss": loss}
        entry.update({"wer": None, "errors": None, "valid_loss": None})
        if self.keep == "best":
            score = measure(*student.result())
            entry["wer"], entry["errors"] = score.wer, score.errors
            entry["valid_loss"] = score.to_dict()["loss"]
        return entry


def _state_of(optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """The state of optimizers as named tensors."""
    return {
        f"optimizers/{name}/{index}/{what}": value
        for name, optimizer in optimizers.items()
        for index, state in optimizer.state_dict()["state"].items()
        for what, value in state.items()
    }


def _load_optimizers(
    optimizers: Optimizers, tensors: Mapping[str, torch.Tensor]
) -> None:
    for name, optimizer in optimizers.items():
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            owner, _, rest = rest.partition("/")
            if (kind, owner) == ("optimizers", name):
                index, _, what = rest.partition("/")
                state.setdefault(int(index), {})[what] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
