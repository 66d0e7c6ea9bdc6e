"""Finished epochs of quantization-aware training, on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...core.layer_quant import LayerQuant
from ...core.plan import check_quant
from ...core.plan_tensors import AdjustedTensors
from ...utils.store import Store
from ...utils.typed import one_line, typed
from .student import Quants


@dataclass
class EpochStore:
    """Finished epochs on disk, so that a killed training resumes.

    An epoch's file holds all that the next one needs. A finished training
    keeps its result only. ``key`` identifies all that decides the result.
    """

    store: Store
    key: str

    def _file(self, epoch: int | None = None) -> str:
        """The file of an epoch, or of the result."""
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
        """Stores the result and deletes all epochs."""
        content = {
            "quants": {name: quant.to_dict() for name, quant in quants.items()},
            "history": history,
        }
        self.store.write_tensors(
            self._file(), self.key, tensors.flat(), content
        )
        for epoch in self._epochs():
            self.store.delete(self._file(epoch))

    def finished(self) -> tuple[Quants, AdjustedTensors, list[dict]] | None:
        """The result that :meth:`finish` stored, if any."""
        known = self.store.read_tensors(
            self._file(), self.key, "result of a training"
        )
        if known is None:
            return None
        flat, raw = known
        try:
            rows = typed(raw, dict, "content")
            kind = dict[str, LayerQuant]
            quants = typed(rows.get("quants"), kind, "quants")
            for name, quant in quants.items():
                check_quant(quant, name)
            history = typed(rows.get("history"), list[dict], "history")
            return quants, AdjustedTensors.from_flat(flat), history
        except ValueError as error:
            raise ValueError(
                f"{self.store.folder / self._file()}: is damaged "
                f"({one_line(error)}); delete it to train again"
            ) from error
