"""The runtime of a run: chosen, tried before the search, and executed.

Integer runtimes compute an encoder from its description. Before long work the
description is computed in float, on one batch, and compared with the encoder;
then the runtime is checked on an encoder that is quantized without a search.
With ``backend: auto`` a runtime that fails a check is replaced by the next one,
at last by the simulation, and the report says why. A runtime that the block
names raises instead. Of other encoders, see :mod:`.run_parts`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import speechbrain as sb
import torch
from torch import nn

from ..config import CommonConfig, ConfigError
from ..core.encoder_spec import (
    check_encoders,
    describe_encoder,
    described_encoders,
)
from ..core.integer_layer import IntegerLayer
from ..folder.write import ModulesSource
from ..model.encoders import Encoder, find_encoders
from ..runtimes.build import (
    build_forwards,
    check_probe,
    executed_form,
)
from ..runtimes.choice import (
    candidates,
    choose_backend,
    first_passing,
    seven_bits_notes,
)
from ..runtimes.forwards import encoder_forward, in_own_precision
from ..runtimes.probe import Compute, Probe, chain, encoder_alone
from ..runtimes.probe_make import encoder_probe, evaluating, quick_integers
from ..runtimes.reference import ReferenceExecutor
from ..runtimes.registry import (
    RUNTIMES,
    select_options,
)
from ..utils import distributed
from ..utils.patching import own_forwards, shadowed_forwards
from ..utils.precision import plain_float32
from ..utils.typed import one_line
from .passes import Call, observe, recognize
from .rebuilt import live_network
from .run import Run

# Largest difference of a description, relative to the largest value: far above
# float rounding, far below the effect of another activation or norm.
_TOLERANCE = 1e-3

logger = logging.getLogger(__name__)


def choose_runtime(
    brain: sb.Brain, config: CommonConfig
) -> tuple[str, list[str]]:
    """Choose the runtime of a variant, with warnings for the report."""
    try:
        name, reasons = choose_backend(config.backend, brain.device)
        if reasons:
            return _simulated("; ".join(r.partition(";")[0] for r in reasons))
        runtime, modules = RUNTIMES[name], dict(brain.modules.items())
        if runtime.encoder is not None and runtime.part is None:
            check_encoders({key: modules[key] for key in config.target})
    except ValueError as error:
        if config.backend != "auto":
            raise ConfigError(f"quantize.{error}") from error
        reason = str(error).partition(";")[0].removeprefix("backend: ")
        return _simulated(reason)
    return name, seven_bits_notes(name, config.weight_bits)


def _simulated(reason: str) -> tuple[str, list[str]]:
    return "torch", [f"Evaluated by simulation: {reason}."]


def try_descriptions(
    brain: sb.Brain, batch: Any, config: CommonConfig, backend: str
) -> tuple[str, list[str]]:
    """Compare what a runtime would compute with the modules, on a batch.

    Returns the runtime and warnings for the report.
    """
    if RUNTIMES[backend].encoder is None:
        return backend, []
    try:
        check_descriptions(brain, batch, config)
    except ValueError as error:
        if config.backend != "auto":
            raise ConfigError(f"quantize.backend: {error}") from error
        return _simulated(str(error).partition(";")[0])
    return backend, []


def check_descriptions(
    brain: sb.Brain, batch: Any, config: CommonConfig
) -> None:
    """Raise unless the descriptions of encoders compute what they do."""
    modules = dict(brain.modules.items())
    encoders = described_encoders({k: modules[k] for k in config.target})
    if not encoders:
        return
    try:
        calls = observe(brain, batch, {e.path: e.model for e in encoders})
    except Exception as error:
        raise ValueError(
            "the recipe cannot recognize a batch in its VALID stage "
            f"({one_line(error)})"
        ) from error
    first = {call.key: call for call in reversed(calls)}
    forwards = {}
    for encoder in encoders:
        spec = describe_encoder(encoder.model, encoder.path, {})
        execute = in_own_precision(encoder_forward(ReferenceExecutor(spec)))
        if encoder.path in first:
            _check_same(encoder, first[encoder.path], execute)
        forwards[encoder.model] = execute
    # The recipe may use more of an encoder's output than its last state.
    with shadowed_forwards(forwards):
        try:
            recognize(brain, batch)
        except Exception as error:
            raise ValueError(
                f"{encoders[0].path}: what the recipe computes from the last "
                f"hidden state fails ({one_line(error)})"
            ) from error


@torch.no_grad()
def _check_same(encoder: Encoder, call: Call, execute: Callable) -> None:
    """Compare a model with its description, on one utterance."""
    args, kwargs = _longest(call)
    wavs, *_ = *args, *kwargs.values()
    with plain_float32(wavs):
        expected = encoder.model(*args, **kwargs).last_hidden_state
        found = execute(*args, **kwargs).last_hidden_state
    if expected.shape != found.shape:
        off, size = "its shape", tuple(expected.shape)
    else:
        difference = float((expected.float() - found).abs().max())
        largest = float(expected.abs().max())
        # False for NaN, too.
        if difference <= _TOLERANCE * largest:
            return
        off, size = f"{difference:.2g}", f"{largest:.2g}"
    raise ValueError(
        f"{encoder.path}: computes something other than its layers in the "
        f"order of wav2vec 2.0 or HuBERT (difference {off} of {size}), which "
        "is not supported by the integer runtimes; use backend: torch"
    )


def _longest(call: Call) -> tuple[tuple, dict[str, Any]]:
    """Arguments of the longest utterance alone: padding is not compared."""
    wavs, *others = (x for x in call.inputs if isinstance(x, torch.Tensor))
    masks = [m for m in others if m.shape == wavs.shape]
    index = int(masks[0].long().sum(1).argmax()) if masks else 0

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and len(value) == len(wavs):
            return value[index : index + 1]
        return value

    kwargs = {name: one(value) for name, value in call.kwargs.items()}
    return tuple(map(one, call.args)), kwargs


def try_probes(runs: Iterable[Run]) -> None:
    """Check each distinct runtime before there is a plan."""
    tried: dict[tuple, tuple[str, list[str]]] = {}
    for run in runs:
        key = (
            run.backend,
            repr(run.config.backend_options),
            run.config.weight_bits,
            run.config.activation_bits,
            *(layer.name for layer in run.layers),
        )
        if key in tried:
            change_runtime(run, *tried[key])
        else:
            reasons = _try_probe(run)
            tried[key] = (run.backend, reasons)


def _try_probe(run: Run) -> list[str]:
    """Check a runtime on a MAX-quantized encoder; return why others failed."""
    encoders = described_encoders(run.modules)
    if RUNTIMES[run.backend].encoder is None or not encoders:
        return []
    encoder, config = encoders[0], run.config
    alone = {encoder.path: encoder.model}
    bits = (config.weight_bits, config.activation_bits)
    place = (config.sample_rate, run.device)
    with evaluating(alone):
        integers = quick_integers(encoder, run.layers, bits, *place)
        forms = [executed_form(run.backend)]
        probe = encoder_probe(encoder, integers, *place, forms)

    def network(forwards: Mapping[nn.Module, Callable]) -> Compute:
        return encoder_alone(encoder.model, forwards)

    _, reasons = _first_passing(run, alone, integers, probe, network)
    return reasons


def make_probe(run: Run) -> None:
    """Make a probe of the encoder alone, where there is no folder."""
    modules = run.modules
    for encoder in described_encoders(modules)[:1]:
        with run.as_stored(), evaluating(modules):
            run.probe = encoder_probe(
                encoder, run.integers, run.config.sample_rate, run.device
            )


@contextmanager
def executed(
    run: Run,
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Execute the modules by the first runtime that passes its probe.

    Yields a context in which they compute in floating point again.
    """
    modules, source = run.modules, run.source

    def network(forwards: Mapping[nn.Module, Callable]) -> Compute:
        if source is None:
            return encoder_alone(find_encoders(modules)[0].model, forwards)
        if isinstance(source, ModulesSource):
            return live_network(source, run.stored_modules, forwards)
        parts = {key: modules[key] for key in source.keys}
        return chain(parts, source.encoder["use_lengths"], forwards)

    forwards, _ = _first_passing(run, modules, run.integers, run.probe, network)
    with shadowed_forwards(forwards):
        yield partial(own_forwards, forwards)


def _first_passing(
    run: Run,
    modules: Mapping[str, nn.Module],
    integers: Mapping[str, IntegerLayer],
    probe: Probe | None,
    network: Callable[[Mapping[nn.Module, Callable]], Compute],
) -> tuple[dict[nn.Module, Callable], list[str]]:
    """Forwards of the first runtime that passes the probe, which becomes the
    run's, and why those before it were rejected.

    ``network`` makes what the probe covers, as a runtime computes it.
    """
    integers = {name: x.to(run.device) for name, x in integers.items()}

    def attempt(name: str) -> tuple[str, dict[nn.Module, Callable]]:
        options = select_options(name, run.config.backend_options)
        peak = run.plan and run.plan.residual_amax
        forwards = build_forwards(
            name,
            modules,
            integers,
            parts=run.parts,
            residual_amax=peak,
            **options,
        )
        if probe is not None:
            with evaluating(modules):
                place = torch.device(run.device)
                check_probe(name, probe, network(forwards), place, options)
        return name, forwards

    names = candidates(run.config.backend, run.device)
    # Processes on other machines may have rejected more runtimes.
    start = max(distributed.gathered(names.index(run.backend)))
    (chosen, forwards), reasons = first_passing(
        names[start:], distributed.together(attempt), run.device
    )
    change_runtime(run, chosen, reasons)
    return forwards, reasons


def change_runtime(run: Run, chosen: str, reasons: Sequence[str]) -> None:
    """Change the runtime, and report why others were rejected."""
    if chosen != run.backend:
        before = seven_bits_notes(run.backend, run.config.weight_bits)
        kept = [text for text in run.warnings if text not in before]
        run.warnings[:] = kept + seven_bits_notes(
            chosen, run.config.weight_bits
        )
        run.backend = chosen
    run.warnings += [f"Not executed by {reason}." for reason in reasons]
