"""Calibration and search sets: drawn from the validation set, and kept in
memory, since a search evaluates them many times."""

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import (
    DynamicItemDataset,
    FilteredSortedDynamicItemDataset,
)
from torch.utils.data import DataLoader, Dataset, Subset

from ..utils.digest import digest
from ..utils.distributed import gathered, share, size
from .audio import AudioError


def dataset_of(data: Dataset | DataLoader) -> Dataset:
    """The data set of a data set or loader."""
    return data.dataset if isinstance(data, DataLoader) else data


def utterance_ids(dataset: Dataset) -> list[str]:
    """IDs of a SpeechBrain data set, or positions of a plain one."""
    if isinstance(dataset, DynamicItemDataset):
        return list(dataset.data_ids)
    return [str(index) for index in range(len(dataset))]


def draw_subset(
    dataset: Dataset,
    num_utterances: int | None,
    most: int,
    seed: int,
    key: str,
) -> Dataset:
    """Draw utterances by their IDs and the seed, sorted by ID.

    ``num_utterances`` None draws all, at most ``most``; ``key`` is the block's
    key, for errors.
    """
    ids = utterance_ids(dataset)
    if not ids:
        raise ValueError(
            f"quantize.{key}: the validation set is empty; check the "
            "recipe's valid_set"
        )
    if num_utterances is None:
        num_utterances = min(len(ids), most)
    if num_utterances > len(ids):
        raise ValueError(
            f"quantize.{key}.num_utterances: {num_utterances} asked, but the "
            f"validation set has {len(ids)}; write {len(ids)} or less"
        )
    if isinstance(dataset, DynamicItemDataset):
        drawn = random.Random(seed).sample(sorted(ids), num_utterances)
        return FilteredSortedDynamicItemDataset(dataset, sorted(drawn))
    positions = random.Random(seed).sample(range(len(ids)), num_utterances)
    return Subset(dataset, sorted(positions))


def audio_of(batch: Any, signal: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The audio [batch, time] and the relative lengths [batch] of a batch."""
    audio = getattr(batch, signal, None)
    if audio is None:
        raise ValueError(
            f"quantize.signal: a batch has no '{signal}'; name the attribute "
            "that holds the audio and its lengths"
        )
    wavs, relative = audio
    return wavs, relative


def _content(batch: Any, names: Collection[str] | None) -> Any:
    """Public attributes or items of a batch, or some of them."""
    if isinstance(batch, Mapping):
        items = batch
    elif hasattr(batch, "__dict__"):
        items = vars(batch)
    else:
        return batch
    return {
        name: value
        for name, value in items.items()
        if not name.startswith("_") and (names is None or name in names)
    }


class Batches:
    """The batches of a set, collated once and kept in memory.

    Each of several processes has its share of the batches, and indices count
    within that share. Uses the collate function of ``loader_options`` only.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        loader_options: Mapping[str, Any],
        signal: str,
    ):
        self.dataset = dataset
        #: All utterances of the set.
        self.ids = utterance_ids(dataset)
        numbers = range(len(self.ids))
        every = [numbers[i : i + batch_size] for i in numbers[::batch_size]]
        #: Indices of this process's batches among all.
        self.places = share(len(every))
        #: Batches of the process that has most.
        self.rounds = -(-len(every) // size())
        self._numbers = [list(every[place]) for place in self.places]
        self._signal = signal
        self._options = {"batch_sampler": self._numbers}
        if "collate_fn" in loader_options:
            self._options["collate_fn"] = loader_options["collate_fn"]
        self._batches: list[Any] | None = None
        self._digests: dict[frozenset[str] | None, str] = {}

    def __len__(self) -> int:
        return len(self.places)

    def load(self) -> Sequence[Any]:
        """The batches; the first call reads and checks the audio."""
        if self._batches is None:
            loader = make_dataloader(self.dataset, **self._options)
            self._batches = list(loader)
            for index in range(len(self._batches)):
                self._check(index)
        return self._batches

    def digest(self, names: Collection[str] | None = None) -> str:
        """Digest of the batches of all processes; ``names``: attributes that
        count beside the audio, None: all."""
        known = None if names is None else frozenset({self._signal, *names})
        if known not in self._digests:
            mine = [
                (place, digest(_content(batch, known)))
                for place, batch in zip(self.places, self.load(), strict=True)
            ]
            rows = sorted(row for part in gathered(mine) for row in part)
            self._digests[known] = digest([self.ids, rows])
        return self._digests[known]

    def lengths(self, index: int) -> tuple[int, list[int]]:
        """Samples of a padded batch, and of each of its utterances."""
        wavs, relative = self._audio(index)
        total = wavs.shape[1]
        return total, [round(float(part) * total) for part in relative]

    def _audio(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return audio_of(self.load()[index], self._signal)

    def _check(self, index: int) -> None:
        wavs, _ = self._audio(index)
        names = ", ".join(self.ids[i] for i in self._numbers[index])
        if wavs.dim() != 2:
            raise AudioError(
                f"utterance {names}: audio of shape {tuple(wavs.shape)}, "
                "not [batch, time]; make it mono in the recipe's pipeline"
            )
        if not torch.isfinite(wavs).all():
            raise AudioError(
                f"utterance {names}: the audio holds NaN or Inf; remove it"
            )
