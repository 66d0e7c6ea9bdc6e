"""What a measurement on a Brain depends on, beside the weights of its modules.

A recipe may read anything in its ``compute_forward``. So one batch is run
while it is written down which attributes of the Brain, of its ``hparams`` and
of the batch are read, and until when layers are called: what is read after the
last layer (a decoder) does not change what the layers see. The values of what
was read, the recipe's code, the modules' settings and the data themselves are
the key under which something measured is remembered.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
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

from ..utils.digest import Code, digest, structure_digest
from ..utils.distributed import from_main
from ..utils.file_digests import FileDigests
from ..utils.files import identity
from ..utils.patching import shadowed
from ..utils.precision import allows_tf32
from ..utils.store import Store

#: What is measured: what the layers see, what ``compute_forward`` gives, or
#: errors and losses.
Kind = Literal["inputs", "outputs", "scores"]
KINDS: tuple[Kind, ...] = ("inputs", "outputs", "scores")

_PACKAGES = ("torch", "speechbrain", "transformers")
# Where a recipe reads from.
_PLACES = ("brain", "hparams", "batch")
_FUNCTIONS = {
    "inputs": ("compute_forward",),
    "outputs": ("compute_forward",),
    "scores": (
        "compute_forward",
        "compute_objectives",
        "evaluate_batch",
        "on_stage_start",
    ),
}
# What a Brain keeps for itself, and what is attached to it here.
_OWN = {
    *inspect.unwrap(sb.Brain.__init__).__code__.co_names,
    "fit",
    "evaluate",
    "stablequant",
}
# Reads all tensors to move them.
_MOVES = ("to", "pin_memory")


@dataclass(frozen=True)
class Reads:
    """Names that were read.

    Arguments
    ---------
    brain, hparams, batch : frozenset of str or None
        Attributes of each; None: any.
    """

    brain: frozenset[str] | None
    hparams: frozenset[str] | None
    batch: frozenset[str] | None


@dataclass
class _Log:
    """Reads in their order."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    #: Places that cannot be watched.
    blind: set[str] = field(default_factory=set)
    silent: bool = False

    def read(self, place: str, name: str) -> None:
        if not self.silent:
            self.rows.append((place, name))

    def reads(self, start: int, end: int) -> Reads:
        rows = self.rows[start:end]
        found = {}
        for place in _PLACES:
            names = {name for where, name in rows if where == place}
            everything = place in self.blind or "__dict__" in names
            found[place] = None if everything else frozenset(names)
        return Reads(**found)


def _watching(kind: type, place: str, log: _Log) -> type:
    """A class whose objects tell which attributes are read."""

    class Watching(kind):
        def __getattribute__(self, name: str) -> Any:
            log.read(place, name)
            found = super().__getattribute__(name)
            return _silently(found, log) if name in _MOVES else found

    Watching.__name__, Watching.__qualname__ = kind.__name__, kind.__qualname__
    Watching.__module__ = kind.__module__
    return Watching


def _silently(function: Callable, log: _Log) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        log.silent = True
        try:
            return function(*args, **kwargs)
        finally:
            log.silent = False

    return call


@contextmanager
def _watched(owner: Any, place: str, log: _Log) -> Iterator[None]:
    """Context in which an object tells which attributes are read."""
    kind = type(owner)
    try:
        owner.__class__ = _watching(kind, place, log)
    except TypeError:
        log.blind.add(place)  # such as a dictionary
        yield
        return
    try:
        yield
    finally:
        owner.__class__ = kind


@contextmanager
def _watched_hparams(brain: sb.Brain, log: _Log) -> Iterator[None]:
    original = vars(brain).get("hparams")
    if type(original) is not SimpleNamespace:
        log.blind.add("hparams")
        yield
        return
    kind = _watching(SimpleNamespace, "hparams", log)
    watched = kind(**vars(original))
    vars(brain)["hparams"] = watched
    try:
        yield
    finally:
        # What the recipe has set meanwhile stays.
        vars(original).clear()
        vars(original).update(vars(watched))
        vars(brain)["hparams"] = original


@torch.no_grad()
def trace(
    brain: sb.Brain,
    batch: Any,
    stage: sb.Stage,
    layers: Collection[nn.Module],
) -> dict[Kind, Reads]:
    """Evaluates one batch and notes what is read.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's.
    batch : Any
        Of its loader.
    stage : sb.Stage
        VALID or TEST.
    layers : collection of Module
        What is read before the last call of one is what they depend on.

    Returns
    -------
    dict
        By what is measured.
    """
    log, last, forward_end = _Log(), 0, 0
    before = vars(brain).copy()
    batch = copy.copy(batch)
    compute_forward = brain.compute_forward

    def called(*_: Any) -> None:
        nonlocal last
        last = len(log.rows)

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal forward_end
        result = compute_forward(*args, **kwargs)
        forward_end = len(log.rows)
        return result

    brain.modules.eval()
    with ExitStack() as stack:
        stack.enter_context(shadowed(brain, "compute_forward", timed_forward))
        for module in layers:
            handle = module.register_forward_hook(called)
            stack.callback(handle.remove)
        stack.enter_context(_watched(batch, "batch", log))
        stack.enter_context(_watched_hparams(brain, log))
        stack.enter_context(_watched(brain, "brain", log))
        brain.on_stage_start(stage, epoch=None)
        start = len(log.rows)
        brain.evaluate_batch(batch, stage=stage)
        end = len(log.rows)
    # What this has made anew (metrics) is no input.
    kept = {k for k, v in before.items() if vars(brain).get(k) is v} - _OWN
    return {
        kind: _only(log.reads(first, end), kept)
        for kind, first, end in (
            ("inputs", start, last or forward_end),
            ("outputs", start, forward_end),
            ("scores", 0, end),
        )
    }


def _only(reads: Reads, names: set[str]) -> Reads:
    own = names if reads.brain is None else reads.brain & names
    return Reads(frozenset(own), reads.hparams, reads.batch)


class Dependencies:
    """What is read on a Brain, and its keys.

    To be made while the modules are those of the float model.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's, with its checkpoint.
    layers : collection of Module
        Those that are quantized.
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
        """What is read in a stage: of the first batch that is asked for."""
        if stage not in self._reads:
            found = trace(self.brain, batch, stage, self.layers)
            self._reads[stage] = from_main(found)
        return self._reads[stage]

    def key(self, batch: Any, stage: sb.Stage, kind: Kind) -> str:
        """Identifies all that a measurement depends on, but weights and data.

        Arguments
        ---------
        batch : Any
            Shows what is read.
        stage : sb.Stage
            VALID or TEST.
        kind : str
            What is measured.

        Returns
        -------
        str
            32 hexadecimal digits.
        """
        reads = self.reads(batch, stage)[kind]
        content = [
            stage.name,
            self._structure,
            arithmetic(self.brain),
            brain_code(self.brain, _FUNCTIONS[kind]).digest,
            self._values(vars(self.brain), reads.brain),
            self._values(hparams_of(self.brain), reads.hparams),
        ]
        return from_main(identity(content))

    def training_key(self) -> str:
        """Identifies all that a training depends on, but weights and data.

        Returns
        -------
        str
            32 hexadecimal digits.
        """
        functions = (*_FUNCTIONS["scores"], "fit_batch", "on_fit_batch_start")
        code = brain_code(self.brain, functions)
        own = code.names & set(vars(self.brain)) - _OWN
        named = code.names & set(hparams_of(self.brain))
        content = [
            self._structure,
            arithmetic(self.brain),
            code.digest,
            self._values(vars(self.brain), own),
            self._values(hparams_of(self.brain), named),
        ]
        return from_main(identity(content))

    def _values(
        self, values: Mapping[str, Any], names: Collection[str] | None
    ) -> dict[str, str]:
        if names is None:
            names = values
        return {
            name: digest(values[name], self._known)
            for name in sorted(names)
            if name in values
        }


def hparams_of(brain: sb.Brain) -> dict[str, Any]:
    """What a recipe has told its Brain, without the quantize block.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's.

    Returns
    -------
    dict

    Example
    -------
    >>> hparams_of(sb.Brain(hparams={"beam_size": 8}))
    {'beam_size': 8}
    """
    # A Brain without hparams has no such attribute.
    found = vars(getattr(brain, "hparams", SimpleNamespace()))
    package = __name__.partition(".")[0]
    return {
        name: value
        for name, value in found.items()
        if type(value).__module__.partition(".")[0] != package
    }


def arithmetic(brain: sb.Brain) -> dict[str, Any]:
    """In which precision, and by which libraries, a Brain computes.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's.

    Returns
    -------
    dict
    """
    device = str(brain.device).partition(":")[0]
    found = {name: version(name) for name in _PACKAGES}
    found |= {"device": device, "precision": brain.eval_precision}
    if device == "cuda":
        found["TF32"] = list(allows_tf32())
    return found


def brain_code(brain: sb.Brain, names: Collection[str]) -> Code:
    """The recipe's code of some functions of its Brain.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's.
    names : collection of str
        Of the functions.

    Returns
    -------
    Code
    """
    kind = type(brain)
    own = vars(brain)
    functions = [own.get(name, getattr(kind, name)) for name in names]
    return Code(functions, kind, sb.Brain)


def dataset_digest(dataset: Dataset, store: Store) -> str:
    """Identifies a set without decoding it: its rows, the content of the files
    that they name, and the recipe's pipeline.

    Arguments
    ---------
    dataset : Dataset
        Of a recipe.
    store : Store
        Remembers the digests of files by path, size and time.

    Returns
    -------
    str
        32 hexadecimal digits.

    Example
    -------
    >>> store = Store(None)
    >>> one = DynamicItemDataset({"u1": {"wrd": "YES"}})
    >>> two = DynamicItemDataset({"u1": {"wrd": "NO"}})
    >>> dataset_digest(one, store) == dataset_digest(two, store)
    False
    """
    if not isinstance(dataset, DynamicItemDataset):
        return digest(dataset)
    files = FileDigests(store)
    rows = [
        [name, {k: files.of(v) for k, v in dataset.data[name].items()}]
        for name in dataset.data_ids
    ]
    files.keep()
    pipeline = dataset.pipeline
    items = [pipeline.dynamic_items, pipeline.output_mapping]
    return digest([rows, items])
