"""The data of a quantization: calibration, search and training sets."""

from collections.abc import Mapping, Sequence
from typing import Any

import speechbrain as sb
from torch.utils.data import DataLoader, Dataset

from ..config import ConfigError, QuantizeConfig
from ..model.layers import min_samples
from ..utils import distributed
from .audio import check_audio
from .data import Batches, dataset_of, draw_subset, utterance_ids
from .run import Run
from .trainer import BrainTrainer

# Maximum number of utterances if the block does not set one.
DEFAULT_UTTERANCES = {"calibration": 128, "search": 256}


def check_set_audio(
    brain: sb.Brain, config: QuantizeConfig, dataset: Dataset
) -> None:
    """Check the audio files of a data set for the Brain's model."""
    check_audio(
        dataset,
        config.audio,
        config.signal,
        config.sample_rate,
        min_samples(dict(brain.modules.items())),
    )


def draw_subsets(
    brain: sb.Brain,
    config: QuantizeConfig,
    runs: Sequence[Run],
    valid_set: Dataset | DataLoader,
    loader_options: Mapping[str, Any],
) -> None:
    """Draw and check the calibration and search sets of each run."""
    dataset = dataset_of(valid_set)
    if isinstance(valid_set, DataLoader):
        loader_options = {"collate_fn": valid_set.collate_fn}
    # Runs share equal sets, to hold their audio in memory once.
    drawn: dict[tuple, Batches] = {}
    for run in runs:
        for name in ("calibration", "search"):
            if name == "search" and not run.config.needs_search:
                continue
            subset = _draw(brain, dataset, run.config, name)
            size = getattr(run.config, name).batch_size
            key = (tuple(utterance_ids(subset)), size)
            if key not in drawn:
                check_set_audio(brain, config, subset)
                drawn[key] = Batches(
                    subset, size, loader_options, config.signal
                )
                _check_shares(name, len(subset), size)
            run.subsets[name] = drawn[key]


def _draw(
    brain: sb.Brain, dataset: Dataset, config: QuantizeConfig, name: str
) -> Dataset:
    part = getattr(config, name)
    count, most = part.num_utterances, DEFAULT_UTTERANCES[name]
    if brain.debug:
        most = brain.debug_batches * part.batch_size
        count = None
    return draw_subset(dataset, count, most, config.seed, name)


def _check_shares(name: str, utterances: int, batch_size: int) -> None:
    """Raise unless each process has a batch of a set."""
    batches = -(-utterances // batch_size)
    if batches < distributed.size():
        raise ConfigError(
            f"quantize.{name}: {batches} batch(es) for {distributed.size()} "
            "processes; start fewer, or give them more utterances"
        )


def make_trainer(
    brain: sb.Brain,
    config: QuantizeConfig,
    runs: Sequence[Run],
    train_set: Dataset | DataLoader | None,
    loader_options: Mapping[str, Any],
) -> BrainTrainer | None:
    """A trainer on the training set, if any run's method trains."""
    if not any(run.config.needs_training for run in runs):
        return None
    if train_set is None or len(dataset_of(train_set)) == 0:
        raise ConfigError(
            "quantize.method: qat trains, and the recipe's training set "
            "is empty; name training data (such as train_splits) or "
            "choose another method"
        )
    return BrainTrainer(
        brain, train_set, loader_options, config.signal, config.seed
    )
