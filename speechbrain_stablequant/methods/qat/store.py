"""Finished epochs of quantization-aware training, on disk."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...core.plan import read_quant
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

    def _result(self) -> str:
        return f"{self.key[:16]}.safetensors"

    def _epoch(self, number: int) -> str:
        return f"{self.key[:16]}_epoch{number}.safetensors"

    def _found(self) -> list[int]:
        head = f"{self.key[:16]}_epoch"
        names = self.store.names(f"{head}*.safetensors")
        return sorted(
            int(name.removeprefix(head).removesuffix(".safetensors"))
            for name in names
        )

    def write(
        self,
        tensors: Mapping[str, torch.Tensor],
        history: list[dict],
        best: int,
    ) -> None:
        """Stores the last epoch of a history, and keeps the best one."""
        number = history[-1]["epoch"]
        self.store.write_tensors(
            self._epoch(number), self.key, tensors, history
        )
        for old in self._found():
            if old not in (number, best):
                self.store.delete(self._epoch(old))

    def read(
        self, number: int | None = None
    ) -> tuple[dict[str, torch.Tensor], list[dict]] | None:
        """Tensors and history of an epoch, by default the last one, if any."""
        if number is None:
            if not self._found():
                return None
            number = self._found()[-1]
        return self.store.read_tensors(
            self._epoch(number), self.key, "finished epoch"
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
            self._result(), self.key, tensors.flat(), content
        )
        for number in self._found():
            self.store.delete(self._epoch(number))

    def finished(self) -> tuple[Quants, AdjustedTensors, list[dict]] | None:
        """The result that :meth:`finish` stored, if any."""
        known = self.store.read_tensors(
            self._result(), self.key, "result of a training"
        )
        if known is None:
            return None
        flat, raw = known
        try:
            rows = typed(raw, dict, "content")
            found = typed(rows.get("quants"), dict, "quants")
            quants = {
                name: read_quant(typed(row, dict, name), name)
                for name, row in found.items()
            }
            history = typed(rows.get("history"), list[dict], "history")
            return quants, AdjustedTensors.from_flat(flat), history
        except ValueError as error:
            raise ValueError(
                f"{self.store.folder / self._result()}: is damaged "
                f"({one_line(error)}); delete it to train again"
            ) from error
