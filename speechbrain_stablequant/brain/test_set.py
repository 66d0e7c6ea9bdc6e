"""A test set, as the recipe gives it to ``Brain.evaluate``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import speechbrain as sb
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class TestSet:
    """A test set with its loader options and its name in the report."""

    brain: sb.Brain
    data: Dataset | DataLoader
    options: Mapping[str, Any]
    name: str

    def loader(self) -> DataLoader:
        """A new loader of the whole set."""
        if isinstance(self.data, DataLoader):
            return self.data
        return self.brain.make_dataloader(
            self.data, sb.Stage.TEST, **{**self.options, "ckpt_prefix": None}
        )

    def first_batch(self) -> Any:
        """The first batch of the set."""
        return next(iter(self.loader()))
