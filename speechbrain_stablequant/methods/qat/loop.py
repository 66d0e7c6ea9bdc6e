"""The epochs of quantization-aware training, and which one is kept."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...core.layer_quant import LayerQuant, quants_json
from ...core.plan_tensors import AdjustedTensors
from ...utils.store import Store
from ..search.score import Score, finite
from ..session.protocols import Optimizers, Trainer
from .config import QatConfig
from .student import Quants, Student

logger = logging.getLogger(__name__)

Measure = Callable[[Quants, AdjustedTensors], Score]


@dataclass
class EpochStore:
    """Finished epochs on disk; a finished training keeps its result only."""

    store: Store
    key: str

    def _file(self, epoch: int | None = None) -> str:
        ending = "" if epoch is None else f"_epoch{epoch}"
        return f"{self.key[:16]}{ending}.safetensors"

    def _epochs(self) -> list[int]:
        pattern = self._file().replace(".", "_epoch*.")
        names = self.store.names(pattern)
        return sorted(int(Path(x).stem.split("_epoch")[1]) for x in names)

    def write(
        self,
        tensors: Mapping[str, torch.Tensor],
        history: list[dict],
        best: int,
    ) -> None:
        """Stores the last epoch of a history, and keeps the best one."""
        last = history[-1]["epoch"]
        self.store.write_tensors(self._file(last), self.key, tensors, history)
        for old in self._epochs():
            if old not in (last, best):
                self.store.delete(self._file(old))

    def read(
        self, epoch: int | None = None
    ) -> tuple[dict[str, torch.Tensor], list[dict]] | None:
        """Tensors and history of an epoch, by default the last one, if any."""
        known = self._epochs() if epoch is None else [epoch]
        if not known:
            return None
        return self.store.read_tensors(
            self._file(known[-1]), self.key, "finished epoch"
        )

    def finish(
        self, quants: Quants, tensors: AdjustedTensors, history: list[dict]
    ) -> None:
        content = {"quants": quants_json(quants), "history": history}
        flat = tensors.flat()
        self.store.write_tensors(self._file(), self.key, flat, content)
        for epoch in self._epochs():
            self.store.delete(self._file(epoch))

    def finished(self) -> tuple[Quants, AdjustedTensors, list[dict]] | None:
        what = "result of a training"
        known = self.store.read_tensors(self._file(), self.key, what)
        if known is None:
            return None
        # As it was written: the store has checked its digest.
        flat, rows = known
        quants = {n: LayerQuant(**row) for n, row in rows["quants"].items()}
        return quants, AdjustedTensors.from_flat(flat), rows["history"]


def train(
    settings: QatConfig,
    student: Student,
    trainer: Trainer,
    measure: Measure,
    store: EpochStore,
    on_batch: Callable[[int, int], None] = lambda epoch, index: None,
) -> tuple[Quants, AdjustedTensors, list[dict]]:
    """Trains, or resumes a killed training.

    ``measure`` scores a result, unless ``keep: last``; ``on_batch`` is called
    before each batch with the epoch and the batch's index. Returns quants,
    tensors and ``{"epoch", "loss", "wer", "errors", "valid_loss"}`` of each
    epoch, None where nothing was measured; epoch 0 is the calibrated model.
    """
    known = store.finished()
    if known is not None:
        return known
    optimizers = make_optimizers(settings, student)
    saved = store.read()
    history: list[dict] = []
    if saved is not None:
        tensors, history = saved
        student.load(tensors)
        _load_optimizers(optimizers, tensors)
    for epoch in range(len(history), settings.epochs + 1):
        loss = None
        if epoch:
            loss = _run(epoch, settings, student, trainer, optimizers, on_batch)
        entry = {"epoch": epoch, "loss": loss}
        entry |= {"wer": None, "errors": None, "valid_loss": None}
        if settings.keep == "best":
            score = measure(*student.result())
            entry["wer"], entry["errors"] = score.wer, score.errors
            entry["valid_loss"] = finite(score.loss)
        _log(entry)
        history.append(entry)
        state = {**student.parameters, **_state_of(optimizers)}
        store.write(state, history, kept(settings, history)["epoch"])
    best = kept(settings, history)["epoch"]
    if best != history[-1]["epoch"]:
        student.load(store.read(best)[0])
    quants, tensors = student.result()
    store.finish(quants, tensors, history)
    return quants, tensors, history


def kept(settings: QatConfig, history: list[dict]) -> dict:
    """Entry of the epoch that is kept: the last one, or that with the fewest
    errors, then the least loss, the calibrated model included."""
    if settings.keep == "last":
        return history[-1]

    def rank(entry: dict) -> tuple:
        loss = entry["valid_loss"]
        return entry["errors"], math.inf if loss is None else loss

    return min(history, key=rank)


def make_optimizers(
    settings: QatConfig, student: Student
) -> dict[str, torch.optim.Optimizer]:
    """One Adam for weights and one for scales if they learn."""
    groups = {
        "weights": (student.trained(scales=False), settings.lr),
        "scales": (student.trained(scales=True), settings.scale_lr),
    }
    return {
        name: torch.optim.Adam(parameters.values(), lr=rate)
        for name, (parameters, rate) in groups.items()
        if parameters
    }


def set_rates(
    settings: QatConfig, optimizers: Optimizers, progress: float
) -> None:
    """Half a cosine from the full rates at 0 down to none at 1."""
    factor = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    rates = {"weights": settings.lr, "scales": settings.scale_lr}
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = rates[name] * factor


def _run(
    epoch: int,
    settings: QatConfig,
    student: Student,
    trainer: Trainer,
    optimizers: Optimizers,
    on_batch: Callable[[int, int], None],
) -> float:

    def before_batch(index: int) -> None:
        done = epoch - 1 + index / len(trainer)
        set_rates(settings, optimizers, done / settings.epochs)
        on_batch(epoch, index)

    with student.active():
        return trainer.epoch(
            epoch, optimizers, before_batch, settings.distill, student.resting
        )


def _log(entry: Mapping) -> None:
    forms = {"loss": "loss {:.4f}", "wer": "WER on the search set {:.2f}"}
    said = [
        form.format(entry[name])
        for name, form in forms.items()
        if entry[name] is not None
    ]
    logger.info("qat: epoch %d: %s", entry["epoch"], ", ".join(said))


def _state_of(optimizers: Optimizers) -> dict[str, torch.Tensor]:
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
        state: dict[int, dict] = defaultdict(dict)
        for key, value in tensors.items():
            if key.startswith(f"optimizers/{name}/"):
                _, _, index, what = key.split("/")
                state[int(index)][what] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
