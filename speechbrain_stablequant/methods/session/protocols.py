"""What methods need of a toolkit: its recognizer and its training loop."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from ...utils.store import Store
from ..search.score import BeforeBatch, Score

Optimizers = Mapping[str, torch.optim.Optimizer]


class Trainer(Protocol):
    """A toolkit's training loop with its data."""

    ids: list[str]
    settings: Mapping[str, Any]  #: what else decides the outcome; JSON-safe

    def __len__(self) -> int:
        """Number of batches of an epoch."""

    def epoch(
        self,
        number: int,
        optimizers: Optimizers,
        before_batch: BeforeBatch,
        distill: float,
        resting: Callable[[], AbstractContextManager[None]],
    ) -> float:
        """Trains for one epoch and returns the mean loss.

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
        """


class Recognizer(Protocol):
    """A speech recognizer with its data.

    ``subset`` is ``"calibration"``, ``"search"`` or ``ranked``.
    """

    modules: Mapping[str, nn.Module]
    show_progress: bool
    rate: str  #: what the metric counts, such as WER
    autoregressive: bool  #: whether it decodes token by token
    ranked: str  #: the subset that the divergence is measured on
    #: The training loop; None if the method does not train.
    trainer: Trainer | None

    def ids(self, subset: str) -> list[str]:
        """Utterances of a subset, in the order in which they are run."""

    def key(self, subset: str, kind: str) -> str:
        """Identifies all that a pass depends on, except the weights.

        ``kind``: ``inputs`` of layers, ``outputs`` of the model, or ``scores``.
        """

    def training_key(self, store: Store) -> str:
        """Identifies all that training depends on, except the weights.

        The store caches digests of audio files.
        """

    def lengths(self, subset: str, batch: int) -> tuple[int, list[int]]:
        """Padded samples of a batch, real samples of each utterance."""

    def forward(
        self,
        subset: str,
        before_batch: BeforeBatch,
        first_only: bool = False,
        turns: int = 1,
    ) -> torch.Tensor:
        """Runs the model over a subset and returns the last output.

        Each batch runs ``turns`` times; ``before_batch`` gets its index.
        """

    def score(
        self, before_batch: BeforeBatch, give_up_above: int | None
    ) -> Score:
        """Scores the search subset.

        Stops after the first batch with which there are more than
        ``give_up_above`` errors. Several processes give the score of one.
        """

    def outputs(
        self, subset: str, before_batch: BeforeBatch
    ) -> Iterator[torch.Tensor | None]:
        """Runs the model over a subset and yields each batch's output."""
