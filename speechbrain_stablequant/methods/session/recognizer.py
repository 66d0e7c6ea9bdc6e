"""What a stage needs of a speech recognizer: a protocol, and its weights."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from ...utils.store import Store
from ..qat.training import Trainer
from ..search import Score

BeforeBatch = Callable[[int], None]


class Recognizer(Protocol):
    """What a stage needs of a speech recognizer and its data.

    ``subset`` is ``"calibration"`` or ``"search"``.
    """

    modules: Mapping[str, nn.Module]
    show_progress: bool
    #: The training loop; None where nothing is trained.
    trainer: Trainer | None

    def ids(self, subset: str) -> list[str]:
        """Utterances of a subset, in the order in which they are run."""

    def key(self, subset: str, kind: str) -> str:
        """Identifies all that a pass over a subset depends on, but the weights
        of the modules. ``kind``: ``inputs`` of layers, ``outputs`` of the
        model, or ``scores``."""

    def training_key(self, store: Store) -> str:
        """Identifies all that a training depends on, but these weights; the
        store remembers the digests of audio files."""

    def lengths(self, subset: str, batch: int) -> tuple[int, list[int]]:
        """Samples of a padded batch, and real samples of each utterance."""

    def forward(
        self,
        subset: str,
        before_batch: BeforeBatch,
        first_only: bool = False,
        turns: int = 1,
    ) -> torch.Tensor:
        """Runs the model over a subset, each batch so many times in a row;
        returns the last output."""

    def score(
        self,
        before_batch: BeforeBatch,
        give_up_above: int | None,
        only: Sequence[int] | None = None,
    ) -> Score:
        """Measures the recognizer on the search subset, or on some of its
        batches."""

    def outputs(
        self, subset: str, before_batch: BeforeBatch
    ) -> Iterator[torch.Tensor | None]:
        """Runs the model over a subset, and gives the output of each batch."""


def fingerprint_modules(modules: Mapping[str, nn.Module]) -> str:
    """Identifies the weights of a model.

    Arguments
    ---------
    modules : Mapping
        Modules by key.

    Returns
    -------
    str
        32 hexadecimal digits of a SHA-256 over names and values.

    Example
    -------
    >>> a = fingerprint_modules({"m": nn.Linear(2, 2)})
    >>> a == fingerprint_modules({"m": nn.Linear(2, 2)})
    False
    """
    digest = hashlib.sha256()
    for key, module in modules.items():
        for name, tensor in module.state_dict().items():
            if not isinstance(tensor, torch.Tensor):
                continue
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{key}.{name}:{tuple(tensor.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
