"""Keys of measurements on a Brain: all that they depend on, but weights.

A key covers the attributes that the recipe reads while it evaluates one batch,
its code, the settings of the modules and the data. What was measured is reused
under the same key only. Reads after the last call of a layer (a decoder's)
cannot change the layers' inputs.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Literal

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import nn
from torch.utils.data import Dataset

from ..utils.digest import Code, FileDigests, digest, structure_digest
from ..utils.distributed import from_main
from ..utils.files import identity
from ..utils.patching import shadowed
from ..utils.precision import allows_tf32
from ..utils.store import Store

#: What is measured: inputs of layers, outputs of ``compute_forward``, or word
#: errors and losses.
Kind = Literal["inputs", "outputs", "scores"]
# The objects that a recipe reads from.
_PLACES = ("brain", "hparams", "batch")
# Attributes that belong to SpeechBrain's Brain, or are attached by us.
_BRAIN_INTERNALS = {
    *("fit", "evaluate", "stablequant"),
    *inspect.unwrap(sb.Brain.__init__).__code__.co_names,
}
# These read all tensors, but only to move them.
_MOVES = ("to", "pin_memory")
_PACKAGES = ("torch", "speechbrain", "transformers")
_SCORING = ("compute_objectives", "evaluate_batch", "on_stage_start")
_FUNCTIONS = {
    "inputs": ("compute_forward",),
    "outputs": ("compute_forward",),
    "scores": ("compute_forward", *_SCORING),
}


@dataclass(frozen=True)
class Reads:
    """Names of the attributes that were read; None: any may have been."""

    brain: frozenset[str] | None
    hparams: frozenset[str] | None
    batch: frozenset[str] | None


class Dependencies:
    """What a Brain's measurements depend on.

    Must be created while the modules are those of the float model. ``layers``
    are the modules whose inputs are measured.
    """

    def __init__(self, brain: sb.Brain, layers: Collection[nn.Module]):
        self.brain = brain
        self.layers = list(layers)
        modules = dict(brain.modules.items())
        self._structure = structure_digest(modules)
        self._known = {
            id(module): f"{key}.{name}"
            for key, top in modules.items()
            for name, module in top.named_modules()
        }
        self._reads: dict[sb.Stage, dict[Kind, Reads]] = {}

    def reads(self, batch: Any, stage: sb.Stage) -> dict[Kind, Reads]:
        """What is read in a stage, traced once, on the first batch given."""
        if stage not in self._reads:
            found = trace(self.brain, batch, stage, self.layers)
            self._reads[stage] = from_main(found)
        return self._reads[stage]

    def key(self, batch: Any, stage: sb.Stage, kind: Kind) -> str:
        """Key of a measurement, without weights and data."""
        reads = self.reads(batch, stage)[kind]
        code = brain_code(self.brain, _FUNCTIONS[kind])
        return self._key([stage.name], code, reads.brain, reads.hparams)

    def training_key(self) -> str:
        """Key of a training, without weights and data."""
        functions = (*_FUNCTIONS["scores"], "fit_batch", "on_fit_batch_start")
        code = brain_code(self.brain, functions)
        own = code.names & set(vars(self.brain)) - _BRAIN_INTERNALS
        return self._key([], code, own, code.names)

    def _key(
        self,
        stage: Sequence[str],
        code: Code,
        own: Collection[str] | None,
        hparams: Collection[str] | None,
    ) -> str:
        content = [
            *stage,
            self._structure,
            arithmetic(self.brain),
            code.digest,
            self._values(vars(self.brain), own),
            self._values(hparams_of(self.brain), hparams),
        ]
        return from_main(identity(content))

    def _values(
        self, values: Mapping[str, Any], names: Collection[str] | None
    ) -> dict[str, str]:
        """Digests of named attributes; ``names`` None: of all."""
        return {
            name: digest(values[name], self._known)
            for name in sorted(values)
            if names is None or name in names
        }


def hparams_of(brain: sb.Brain) -> dict[str, Any]:
    """The recipe's hparams, without the quantize block."""
    # A Brain without hparams has no such attribute.
    found = vars(getattr(brain, "hparams", SimpleNamespace()))
    package = __name__.partition(".")[0]
    return {
        name: value
        for name, value in found.items()
        if type(value).__module__.partition(".")[0] != package
    }


def arithmetic(brain: sb.Brain) -> dict[str, Any]:
    """Device, precision and library versions that a Brain computes with."""
    device = str(brain.device).partition(":")[0]
    found = {name: version(name) for name in _PACKAGES}
    found |= {"device": device, "precision": brain.eval_precision}
    if device == "cuda":
        found["TF32"] = list(allows_tf32())
    return found


def brain_code(brain: sb.Brain, names: Collection[str]) -> Code:
    """The recipe's code of functions of its Brain, given by name."""
    kind = type(brain)
    own = vars(brain)
    functions = [own.get(name, getattr(kind, name)) for name in names]
    return Code(functions, kind, sb.Brain)


def dataset_digest(dataset: Dataset, store: Store) -> str:
    """Digest of a data set's rows, files and pipeline, without decoding it."""
    if not isinstance(dataset, DynamicItemDataset):
        return digest(dataset)
    files = FileDigests(store)
    named = ((name, dataset.data[name]) for name in dataset.data_ids)
    rows = [[n, {k: files.of(v) for k, v in row.items()}] for n, row in named]
    files.keep()
    pipeline = dataset.pipeline
    return digest([rows, [pipeline.dynamic_items, pipeline.output_mapping]])


@dataclass
class _Log:
    """Reads in order."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    #: Objects that cannot be watched.
    blind: set[str] = field(default_factory=set)
    silent: bool = False

    def read(self, place: str, name: str) -> None:
        if not self.silent:
            self.rows.append((place, name))

    def reads(self, start: int, end: int, own: set[str]) -> Reads:
        """Reads in a span of rows; of the Brain's attributes only ``own``."""
        found = {}
        for place in _PLACES:
            names = {x for where, x in self.rows[start:end] if where == place}
            everything = place in self.blind or "__dict__" in names
            found[place] = None if everything else frozenset(names)
        brain = found.pop("brain")
        brain = frozenset(own if brain is None else brain & own)
        return Reads(brain, **found)


def _watching(kind: type, place: str, log: _Log) -> type:
    """Subclass of ``kind`` that logs the reads of attributes."""

    class Watching(kind):
        def __getattribute__(self, name: str) -> Any:
            log.read(place, name)
            found = super().__getattribute__(name)
            return _silently(found, log) if name in _MOVES else found

    Watching.__name__, Watching.__qualname__ = kind.__name__, kind.__qualname__
    Watching.__module__ = kind.__module__
    return Watching


def _silently(function: Callable, log: _Log) -> Callable:
    """Wrap a function to log nothing that it reads."""

    def call(*args: Any, **kwargs: Any) -> Any:
        log.silent = True
        try:
            return function(*args, **kwargs)
        finally:
            log.silent = False

    return call


@contextmanager
def _watched(owner: Any, place: str, log: _Log) -> Iterator[None]:
    """Log the reads of an object's attributes."""
    kind = type(owner)
    try:
        owner.__class__ = _watching(kind, place, log)
    except TypeError:
        log.blind.add(place)  # Such as a dictionary.
        yield
        return
    try:
        yield
    finally:
        owner.__class__ = kind


@contextmanager
def _watched_hparams(brain: sb.Brain, log: _Log) -> Iterator[None]:
    """Log the reads of hparams; a SimpleNamespace cannot change its class."""
    original = vars(brain).get("hparams")
    if type(original) is not SimpleNamespace:
        log.blind.add("hparams")
        yield
        return
    kind = _watching(SimpleNamespace, "hparams", log)
    watched = kind(**vars(original))
    try:
        with shadowed(brain, "hparams", watched):
            yield
    finally:
        # Keep what the recipe has set meanwhile.
        vars(original).clear()
        vars(original).update(vars(watched))


@torch.no_grad()
def trace(
    brain: sb.Brain, batch: Any, stage: sb.Stage, layers: Collection[nn.Module]
) -> dict[Kind, Reads]:
    """Evaluate one batch and return the reads that each kind depends on."""
    log, last, forward_end = _Log(), 0, 0
    before = vars(brain).copy()
    batch = copy.copy(batch)
    compute_forward = brain.compute_forward

    def called(*_: Any) -> None:
        nonlocal last
        last = len(log.rows)

    def watched_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal forward_end
        result = compute_forward(*args, **kwargs)
        forward_end = len(log.rows)
        return result

    brain.modules.eval()
    with ExitStack() as stack:
        stack.enter_context(shadowed(brain, "compute_forward", watched_forward))
        for module in layers:
            stack.enter_context(module.register_forward_hook(called))
        stack.enter_context(_watched(batch, "batch", log))
        stack.enter_context(_watched_hparams(brain, log))
        stack.enter_context(_watched(brain, "brain", log))
        brain.on_stage_start(stage, epoch=None)
        start = len(log.rows)
        brain.evaluate_batch(batch, stage=stage)
        end = len(log.rows)
    # Attributes created during the evaluation (metrics) are no inputs.
    own = {k for k, v in before.items() if vars(brain).get(k) is v}
    own -= _BRAIN_INTERNALS
    spans = {
        "inputs": (start, last or forward_end),
        "outputs": (start, forward_end),
        "scores": (0, end),
    }
    return {kind: log.reads(*span, own) for kind, span in spans.items()}
