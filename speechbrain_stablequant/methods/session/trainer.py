"""What quantization-aware training needs of a toolkit: a protocol."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

Optimizers = Mapping[str, torch.optim.Optimizer]


class Trainer(Protocol):
    """A toolkit's training loop with its data."""

    ids: list[str]
    #: What else decides the outcome; JSON-safe.
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        """Number of batches of an epoch."""

    def epoch(
        self,
        number: int,
        optimizers: Optimizers,
        before_batch: Callable[[int], None],
        distill: float,
        resting: Callable[[], AbstractContextManager[None]],
    ) -> float:
        """Trains for one epoch.

        Arguments
        ---------
        number : int
            Starting with 1; seeds everything random in the epoch.
        optimizers : Mapping
            Optimizers by name.
        before_batch : callable
            Called with the index of each batch before it is run.
        distill : float
            0: the recipe's loss; 1: the divergence from the float model; in
            between: a mixture.
        resting : callable
            Makes a context in which the model is the float model.

        Returns
        -------
        float
            The mean loss.
        """
