"""The sets of a run: for calibration and search, kept in memory, and tests."""

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import speechbrain as sb
import torch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import (
    DynamicItemDataset,
    FilteredSortedDynamicItemDataset,
)
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..config import ConfigError
from ..model.encoders import min_samples
from ..utils.digest import digest
from ..utils.distributed import gathered, share, size
from ..utils.typed import short
from .audio import AudioError, check_audio

if TYPE_CHECKING:
    from ..methods.registry import QuantizeConfig

# Maximum number of utterances if the block does not set one.
DEFAULT_UTTERANCES = {"calibration": 128, "search": 256}
_VALIDATION = "validation set"


def drawn_from(brain: sb.Brain) -> str:
    """What users call the set from which these are drawn."""
    return getattr(brain, "drawn_from", _VALIDATION)


def dataset_of(data: Dataset | DataLoader) -> Dataset:
    """The data set of a data set or loader."""
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"quantize: {type(dataset).__name__} is an IterableDataset, from "
            "which nothing can be drawn; give a data set with a length"
        )
    return dataset


def utterance_ids(dataset: Dataset) -> list[str]:
    """IDs of a SpeechBrain data set, or positions of a plain one."""
    if isinstance(dataset, DynamicItemDataset):
        return list(dataset.data_ids)
    if isinstance(dataset, Subset):
        ids = utterance_ids(dataset.dataset)
        return [ids[index] for index in dataset.indices]
    return [str(index) for index in range(len(dataset))]


def draw_subset(
    dataset: Dataset,
    num_utterances: int | None,
    most: int,
    seed: int,
    key: str,
    whole: str = _VALIDATION,
) -> Dataset:
    """Draw utterances by their IDs and the seed, sorted by ID.

    ``num_utterances`` None draws all, at most ``most``; for errors, ``key`` is
    the block's key, and ``whole`` what the data set is called.
    """
    ids = utterance_ids(dataset)
    if not ids:
        raise ValueError(
            f"quantize.{key}: the {whole} is empty; check the recipe's "
            "valid_set"
        )
    if num_utterances is None:
        num_utterances = min(len(ids), most)
    if num_utterances > len(ids):
        raise ValueError(
            f"quantize.{key}.num_utterances: {num_utterances} asked, but the "
            f"{whole} has {len(ids)}; write {len(ids)} or less"
        )
    if isinstance(dataset, DynamicItemDataset):
        drawn = random.Random(seed).sample(sorted(ids), num_utterances)
        return FilteredSortedDynamicItemDataset(dataset, sorted(drawn))
    positions = random.Random(seed).sample(range(len(ids)), num_utterances)
    return Subset(dataset, sorted(positions))


def check_set_audio(
    brain: sb.Brain, config: "QuantizeConfig", dataset: Dataset
) -> None:
    """Check the audio files of a data set for the Brain's model."""
    least = min_samples(dict(brain.modules.items()))
    rate = config.sample_rate
    check_audio(dataset, config.audio, config.signal, rate, least)


def draw_subsets(
    brain: sb.Brain,
    configs: Iterable["QuantizeConfig"],
    valid_set: Dataset | DataLoader,
    loader_options: Mapping[str, Any],
) -> list[dict[str, "Batches"]]:
    """Draw and check the calibration and search sets of each variant."""
    dataset = dataset_of(valid_set)
    if isinstance(valid_set, DataLoader):
        loader_options = {"collate_fn": valid_set.collate_fn}
    # Variants share equal sets, to hold their audio in memory once.
    drawn: dict[tuple, Batches] = {}

    def draw(config: "QuantizeConfig", name: str) -> Batches:
        part, most = getattr(config, name), DEFAULT_UTTERANCES[name]
        count = part.num_utterances
        if brain.debug:
            count, most = None, brain.debug_batches * part.batch_size
        whole = drawn_from(brain)
        subset = draw_subset(dataset, count, most, config.seed, name, whole)
        key = (*utterance_ids(subset), part.batch_size)
        if key not in drawn:
            check_set_audio(brain, config, subset)
            drawn[key] = Batches(
                subset, part.batch_size, loader_options, config.signal
            )
            if drawn[key].count < size():
                raise ConfigError(
                    f"quantize.{name}: {drawn[key].count} batch(es) for "
                    f"{size()} processes; start fewer, or give them more "
                    "utterances"
                )
        return drawn[key]

    return [
        {
            name: draw(config, name)
            for name in DEFAULT_UTTERANCES
            if name == "calibration" or config.needs_search
        }
        for config in configs
    ]


def audio_of(batch: Any, signal: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The audio [batch, time] and the relative lengths [batch] of a batch."""
    audio = getattr(batch, signal, None)
    if audio is None:
        raise ValueError(
            f"quantize.signal: a batch has no '{signal}'; name the attribute "
            "that holds the audio and its lengths"
        )
    pair = isinstance(audio, list | tuple) and len(audio) == 2
    if not (pair and all(isinstance(x, torch.Tensor) for x in audio)):
        raise ValueError(
            f"quantize.signal: '{signal}' of a batch is not audio and lengths "
            f"but {short(audio)}; name the attribute that holds these"
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
        #: Batches of all processes.
        self.count = len(every)
        #: Indices of this process's batches among all.
        self.places = share(self.count)
        #: Batches of the process that has most.
        self.rounds = -(-self.count // size())
        self._numbers = [list(every[place]) for place in self.places]
        self._signal = signal
        self._options = {"batch_sampler": self._numbers}
        if "collate_fn" in loader_options:
            self._options["collate_fn"] = loader_options["collate_fn"]
        self._batches: list[Any] | None = None
        self._digests: dict[frozenset[str] | None, str] = {}

    def __len__(self) -> int:
        return len(self.places)

    def drawn(self, most: int) -> "Batches":
        """Batches of at most so many of these utterances."""
        subset = draw_subset(self.dataset, None, most, 0, "search")
        size = len(self._numbers[0])
        return Batches(subset, size, self._options, self._signal)

    def load(self) -> Sequence[Any]:
        """The batches; the first call reads and checks the audio."""
        if self._batches is None:
            self._batches = list(make_dataloader(self.dataset, **self._options))
            pairs = zip(self._numbers, self._batches, strict=True)
            for numbers, batch in pairs:
                names = ", ".join(self.ids[i] for i in numbers)
                _check_batch(names, audio_of(batch, self._signal)[0])
        return self._batches

    def digest(self, names: Collection[str] | None = None) -> str:
        """Digest of the batches of all processes; ``names``: attributes that
        count beside the audio, None: all."""
        known = None if names is None else frozenset({self._signal, *names})
        if known not in self._digests:
            pairs = zip(self.places, self.load(), strict=True)
            mine = [(i, digest(_content(batch, known))) for i, batch in pairs]
            rows = sorted(row for part in gathered(mine) for row in part)
            self._digests[known] = digest([self.ids, rows])
        return self._digests[known]

    def lengths(self, index: int) -> tuple[int, list[int]]:
        """Samples of a padded batch, and of each of its utterances."""
        wavs, relative = audio_of(self.load()[index], self._signal)
        total = wavs.shape[1]
        return total, [round(float(part) * total) for part in relative]


def _check_batch(names: str, wavs: torch.Tensor) -> None:
    if wavs.dim() != 2:
        raise AudioError(
            f"utterance {names}: audio of shape {tuple(wavs.shape)}, "
            "not [batch, time]; make it mono in the recipe's pipeline"
        )
    if not torch.isfinite(wavs).all():
        raise AudioError(
            f"utterance {names}: the audio holds NaN or Inf; remove it"
        )


@dataclass(frozen=True)
class TestSet:
    """A test set as given to ``Brain.evaluate``, and its name."""

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
