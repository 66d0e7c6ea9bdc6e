"""The protocol of a speech recognizer, and the fingerprint of its weights."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from ...utils.store import Store
from ..search import Score
from .trainer import Trainer

BeforeBatch = Callable[[int], None]


class Recognizer(Protocol):
    """A speech recognizer with its data.

    ``subset`` is ``"calibration"`` or ``"search"``.
    """

    modules: Mapping[str, nn.Module]
    show_progress: bool
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
        self,
        before_batch: BeforeBatch,
        give_up_above: int | None,
        only: Sequence[int] | None = None,
    ) -> Score:
        """Scores the search subset, or the batches named by ``only``.

        Stops early once there are more than ``give_up_above`` errors.
        """

    def outputs(
        self, subset: str, before_batch: BeforeBatch
    ) -> Iterator[torch.Tensor | None]:
        """Runs the model over a subset and yields each batch's output."""


def fingerprint_modules(modules: Mapping[str, nn.Module]) -> str:
    """Identifies names and values of weights: 32 hex digits of a SHA-256."""
    digest = hashlib.sha256()
    for key, module in modules.items():
        for name, tensor in module.state_dict().items():
            if not isinstance(tensor, torch.Tensor):
                continue
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{key}.{name}:{tuple(tensor.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
