"""Keys of measurements on a Brain: all that they depend on, but weights.

A key covers the attributes that the recipe reads, its code, the settings of the
modules and the data. What was measured is reused under the same key only.
"""

from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import speechbrain as sb
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import nn
from torch.utils.data import Dataset

from ..utils.digest import Code, digest, structure_digest
from ..utils.distributed import from_main
from ..utils.file_digests import FileDigests
from ..utils.files import identity
from ..utils.precision import allows_tf32
from ..utils.store import Store
from .trace import BRAIN_INTERNALS, Kind, Reads, trace

_PACKAGES = ("torch", "speechbrain", "transformers")
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
        own = code.names & set(vars(self.brain)) - BRAIN_INTERNALS
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
    rows = [
        [name, {k: files.of(v) for k, v in dataset.data[name].items()}]
        for name in dataset.data_ids
    ]
    files.keep()
    pipeline = dataset.pipeline
    items = [pipeline.dynamic_items, pipeline.output_mapping]
    return digest([rows, items])
