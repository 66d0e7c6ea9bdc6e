"""Passes of a Brain over batches, which they leave as they are; their time."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy
import speechbrain as sb
import torch
from torch import nn

from ..report.results import Turns
from ..utils.digest import digest, tensor_digest
from ..utils.patching import shadowed
from ..utils.timing import BatchTimes
from .data import audio_of
from .metrics import metric_of

#: Batches of a test set that the float model recognizes once more.
MOST_TURNS = 10


@torch.no_grad()
def recognize(brain: sb.Brain, batch: Any) -> Any:
    """The output of ``compute_forward`` in the VALID stage."""
    brain.modules.eval()
    with brain.evaluation_ctx:
        return brain.compute_forward(copy.copy(batch), stage=sb.Stage.VALID)


@contextmanager
def reproducible(seed: int | None) -> Iterator[None]:
    """Fork all random number generators; seed them unless ``seed`` is None."""
    states = random.getstate(), numpy.random.get_state()
    # fork_rng would fork the generators of all GPUs.
    used = torch.cuda.is_initialized()
    devices = [torch.cuda.current_device()] if used else []
    try:
        with torch.random.fork_rng(devices):
            if seed is not None:
                random.seed(seed)
                numpy.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextmanager
def decoding_each_time(brain: sb.Brain) -> Iterator[None]:
    """Context in which a recipe decodes its validation set in each epoch."""
    hparams, key = getattr(brain, "hparams", None), "valid_search_interval"
    if not hasattr(hparams, key):
        yield
        return
    with shadowed(hparams, key, 1):
        yield


@torch.no_grad()
def evaluation_steps(
    brain: sb.Brain,
    batches: Iterable[Any],
    stage: sb.Stage,
    metric_attribute: str,
    before_batch: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[float, Any, int]]:
    """Evaluate batches; yield each one's loss, the metric, and its utterances.

    Does not call ``on_stage_end``, which anneals learning rates, logs and
    saves checkpoints.
    """
    brain.on_stage_start(stage, epoch=None)
    brain.modules.eval()
    metric = metric_of(brain, metric_attribute)
    for index, batch in enumerate(batches):
        before_batch(index)
        before = len(metric.scores)
        with decoding_each_time(brain):
            loss = brain.evaluate_batch(copy.copy(batch), stage=stage)
        yield float(loss), metric, len(metric.scores) - before


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in a nested output of ``compute_forward``."""
    if isinstance(output, torch.Tensor):
        yield output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        for part in output:
            yield from tensors(part)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first of :func:`tensors`, if any."""
    return next(tensors(output), None)


class ForwardClock:
    """Times ``compute_forward`` by batch: model and decoding, no scoring.

    Excludes what a runtime compiles for a new length.
    """

    def __init__(self, brain: sb.Brain, signal: str, sample_rate: int):
        self.brain = brain
        self.signal = signal
        self.sample_rate = sample_rate
        self.forward = brain.compute_forward
        self._times = BatchTimes(self._synchronize)
        #: Seconds of audio in each batch.
        self.audio: list[float] = []
        self._digests: list[str] = []

    @property
    def seconds(self) -> list[float]:
        """Computing time of each batch."""
        return self._times.seconds

    @property
    def audio_digest(self) -> str:
        """Digest of the audio and of its batching."""
        return digest(self._digests)

    @contextmanager
    def running(self) -> Iterator["ForwardClock"]:
        """Measure while the context is open."""
        with shadowed(self.brain, "compute_forward", self.timed):
            yield self

    def timed(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """``compute_forward``, measured."""
        wavs, relative = audio_of(batch, self.signal)
        samples = float((relative * wavs.shape[1]).sum())
        self._digests.append(tensor_digest(wavs, relative))
        with self._times.batch():
            result = self.forward(batch, *args, **kwargs)
        self.audio.append(samples / self.sample_rate)
        return result

    def _synchronize(self) -> None:
        if str(self.brain.device).startswith("cuda"):
            torch.cuda.synchronize()


class FloatTurns:
    """Has the float model recognize some batches of a quantized evaluation,
    each just before the quantized model does.

    Both then meet the same load of the machine and the same caches. The batches
    are spread evenly over the ``total`` of them. ``in_float`` is the context
    in which the modules compute in floating point.
    """

    def __init__(
        self,
        clock: ForwardClock,
        total: int,
        in_float: Callable[[], AbstractContextManager[None]],
    ):
        self.clock = clock
        self.in_float = in_float
        self._step = max(-(-total // MOST_TURNS), 1)
        self._float = ForwardClock(clock.brain, clock.signal, clock.sample_rate)
        # Nothing else that replaces it sees the float model's pass.
        self._float.forward = clock.forward

    @contextmanager
    def running(self) -> Iterator["FloatTurns"]:
        """Take turns while the context, inside all others, is open."""
        inner = self.clock.brain.compute_forward
        counter = count()

        def taking_turns(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if next(counter) % self._step == 0:
                with self.in_float(), reproducible(None):
                    self._float.timed(copy.copy(batch), *args, **kwargs)
            return inner(batch, *args, **kwargs)

        with shadowed(self.clock.brain, "compute_forward", taking_turns):
            yield self

    @property
    def times(self) -> Turns:
        """Those of both models, without the first turn of several, in which
        memory is allocated."""
        step, counted = self._step, BatchTimes.counted
        return Turns(
            counted(self._float.seconds),
            counted(self.clock.seconds[::step]),
            counted(self.clock.audio[::step]),
        )


@dataclass(frozen=True)
class Call:
    """One call of a module of the Brain."""

    key: str
    args: tuple
    kwargs: dict[str, Any]
    output: Any

    @property
    def inputs(self) -> tuple:
        """Positional arguments, then the values of keyword arguments."""
        return *self.args, *self.kwargs.values()


@contextmanager
def recording(
    modules: Mapping[str, nn.Module], record: Callable[[Call], Any]
) -> Iterator[None]:
    """Context that records the calls of modules, in order of their ends."""

    def hook(key: str, _, args: tuple, kwargs: dict, output: Any) -> None:
        record(Call(key, args, kwargs, output))

    with ExitStack() as stack:
        for key, module in modules.items():
            handle = module.register_forward_hook(
                partial(hook, key), with_kwargs=True
            )
            stack.enter_context(handle)
        yield


def observe(
    brain: sb.Brain, batch: Any, modules: Mapping[str, nn.Module]
) -> list[Call]:
    """The calls of modules while the Brain recognizes a batch."""
    calls: list[Call] = []
    with recording(modules, calls.append):
        recognize(brain, batch)
    return calls


def same(one: Any, two: Any) -> bool:
    """Whether two values are equal tensors."""
    tensors = isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
    return tensors and torch.equal(one, two)
