"""Parts of a run's recognizer: graphs, layers in place, or float.

Where a runtime has no encoder of the recognizer, its modules are captured and
timed. Where it has, what a search calls at each step is timed layer by layer:
a call costs more than it saves there.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from ..core.encoder_spec import described_encoders
from ..core.parts import Part
from ..core.plan import QuantizationPlan
from ..runtimes.build import in_place_forwards
from ..runtimes.choice import seven_bits_notes
from ..runtimes.cpu import machine_identity
from ..runtimes.probe_make import evaluating
from ..runtimes.registry import (
    RUNTIMES,
    code_digest,
    load_function,
    select_options,
)
from ..utils import distributed
from ..utils.digest import structure_digest
from ..utils.files import identity
from ..utils.typed import typed
from .data import audio_of
from .passes import recognize
from .recognizer import searchers
from .run import Run

logger = logging.getLogger(__name__)

#: The decisions, in the run's folder.
PARTS_FILE = "parts.json"
_WHAT = "parts of the recognizer"
#: Batches of different lengths that are captured and timed, of so many.
_LENGTHS, _SEARCHED = 3, 16
#: Parts that a warning names.
_NAMED = 3


def decide_parts(run: Run, batch: Any) -> None:
    """Decide the run's parts, once for each model and machine.

    ``batch`` is used where the run has no calibration set.
    """
    config, runtime = run.config, RUNTIMES[run.backend]
    given = config.plan is not None
    run.parts = QuantizationPlan.load(config.plan, False).parts if given else []
    if not run.parts and runtime.part is not None:
        found = distributed.from_main(
            _decide(run, batch) if distributed.is_main() else []
        )
        # A given plan that was only simulated has no parts. It quantizes each
        # layer, also where float is as fast.
        run.parts = [x for x in found if x.executes == "graph" or not given]
    for part in run.parts:
        logger.info("quantize: %s: %s", part.name, part.reason)
    floats = [part for part in run.parts if part.executes == "float"]
    first = "', '".join(part.name for part in floats[:_NAMED])
    if floats:
        more = f" and {len(floats) - _NAMED} more" * (len(floats) > _NAMED)
        run.warnings.append(
            f"Computed in floating point with weights stored as integers: "
            f"'{first}'{more} ({floats[0].reason})."
        )
    if len(run.weights_alone) == len(run.layers):
        notes = seven_bits_notes(run.backend, config.weight_bits)
        run.warnings[:] = [x for x in run.warnings if x not in notes]


def _decide(run: Run, batch: Any) -> list[Part]:
    config, layers = run.config, run.layers
    target = {key: run.modules[key] for key in config.target}
    described = described_encoders(target)
    if described:
        # A runtime has them; what a search calls at each step may be as fast
        # in float.
        paths = tuple(f"{encoder.path}." for encoder in described)
        layers = [x for x in layers if not x.name.startswith(paths)]
        if not layers or not searchers(run.brain):
            return []
    options = select_options(run.backend, config.backend_options)
    key = identity(
        [
            structure_digest(target),
            [[layer.name, list(layer.module.weight.shape)] for layer in layers],
            repr(options),
            code_digest(),
            machine_identity(),
        ]
    )
    known = run.store.read(
        PARTS_FILE, key, _WHAT, lambda raw: typed(raw, list[Part], "content")
    )
    if known is not None:
        return known
    modules = run.modules
    with evaluating(modules):
        select = load_function("captured.select:Selection")
        parts = select(
            modules,
            layers,
            [partial(recognize, run.brain, x) for x in _batches(run, batch)],
            partial(in_place_forwards, modules),
            (config.weight_bits, config.activation_bits),
            options,
            graphs=not described,
        ).parts()
    run.store.write(PARTS_FILE, key, [asdict(part) for part in parts])
    return parts


def _batches(run: Run, batch: Any) -> Sequence[Any]:
    """Batches of different lengths, the longest first."""
    every = [batch]
    if "calibration" in run.subsets:
        every = run.subsets["calibration"].load()[:_SEARCHED] or every
    signal = run.config.signal
    by_length = {audio_of(x, signal)[0].shape[1]: x for x in every}
    lengths = sorted(by_length, reverse=True)
    step = max((len(lengths) - 1) / (_LENGTHS - 1), 1)
    places = [round(i * step) for i in range(_LENGTHS)]
    return [by_length[lengths[i]] for i in places if i < len(lengths)]
