"""The runtime of a run: chosen, tried before the search, and executed.

With ``backend: auto`` a runtime that fails a check is replaced by the next one,
at last by the simulation, and the report says why. A runtime that the block
names raises instead.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import speechbrain as sb
import torch
from torch import nn

from ..config import ConfigError
from ..core.encoder_spec import check_encoders
from ..model.layers import find_encoders
from ..runtimes.base import shadowed_forwards
from ..runtimes.build import build_forwards
from ..runtimes.choice import (
    candidates,
    choose_backend,
    first_right,
)
from ..runtimes.cpu import PAIR_SUM_BITS, cpu_class
from ..runtimes.probe_make import encoder_probe
from ..runtimes.probe_networks import (
    Compute,
    chain,
    encoder_alone,
    evaluating,
    quick_integers,
)
from ..runtimes.prove import executed_form, prove
from ..runtimes.registry import RUNTIMES, select_options
from ..utils import distributed
from .dry_run import check_descriptions

if TYPE_CHECKING:
    from ..core.integer_layer import IntegerLayer
    from ..methods.registry import QuantizeConfig
    from ..runtimes.probe import Probe
    from .run import Run


def choose_runtime(
    brain: sb.Brain, config: "QuantizeConfig"
) -> tuple[str, list[str]]:
    """Choose the runtime of a variant, with warnings for the report."""
    try:
        name, reasons = choose_backend(config.backend, brain.device)
        if reasons:
            return _simulated("; ".join(r.partition(";")[0] for r in reasons))
        if RUNTIMES[name].encoder is not None:
            modules = dict(brain.modules.items())
            check_encoders({key: modules[key] for key in config.target})
    except ValueError as error:
        if config.backend != "auto":
            raise ConfigError(f"quantize.{error}") from error
        reason = str(error).partition(";")[0].removeprefix("backend: ")
        return _simulated(reason)
    return name, _seven_bits_notes(name, config)


def _simulated(reason: str) -> tuple[str, list[str]]:
    return "torch", [f"Evaluated by simulation: {reason}."]


def _seven_bits_notes(name: str, config: "QuantizeConfig") -> list[str]:
    """Warn if a runtime executes weights with fewer bits than the plan's."""
    cpu, bits = cpu_class(), config.weight_bits
    if cpu.exact or RUNTIMES[name].device != "cpu" or bits <= PAIR_SUM_BITS:
        return []
    return [
        f"This CPU (class {cpu.name}) has no VNNI: weights of {bits} bits "
        f"were executed with {PAIR_SUM_BITS}."
    ]


def try_descriptions(
    brain: sb.Brain, batch: Any, config: "QuantizeConfig", backend: str
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


def try_probe(run: "Run") -> list[str]:
    """Check the runtime before there is a plan, on a MAX-quantized encoder.

    Returns why earlier runtimes were rejected.
    """
    encoders = find_encoders(run.modules)
    if RUNTIMES[run.backend].encoder is None or not encoders:
        return []
    encoder, config = encoders[0], run.config
    alone = {encoder.path: encoder.model}
    bits = (config.weight_bits, config.activation_bits)
    with evaluating(alone):
        integers = quick_integers(
            encoder, run.layers, bits, config.sample_rate, run.device
        )
        probe = encoder_probe(
            encoder,
            integers,
            config.sample_rate,
            run.device,
            [executed_form(run.backend)],
        )

    def network(forwards: Mapping[nn.Module, Callable]) -> Compute:
        return encoder_alone(encoder.model, forwards)

    _, reasons = _first_right(run, alone, integers, probe, network)
    return reasons


def make_probe(run: "Run") -> None:
    """Make a probe of the encoder alone, where there is no folder."""
    modules = run.modules
    for encoder in find_encoders(modules)[:1]:
        with run.as_stored(), evaluating(modules):
            run.probe = encoder_probe(
                encoder, run.integers, run.config.sample_rate, run.device
            )


def executed(run: "Run") -> AbstractContextManager[None]:
    """Execute the modules by the first runtime that passes its probe."""
    modules = run.modules

    def network(forwards: Mapping[nn.Module, Callable]) -> Compute:
        if run.source is None:
            return encoder_alone(find_encoders(modules)[0].model, forwards)
        parts = {key: modules[key] for key in run.source.keys}
        return chain(parts, run.source.encoder["use_lengths"], forwards)

    forwards, _ = _first_right(run, modules, run.integers, run.probe, network)
    return shadowed_forwards(forwards)


def _first_right(
    run: "Run",
    modules: Mapping[str, nn.Module],
    integers: Mapping[str, "IntegerLayer"],
    probe: "Probe | None",
    network: Callable[[Mapping[nn.Module, Callable]], Compute],
) -> tuple[dict[nn.Module, Callable], list[str]]:
    """Forwards of the first runtime that passes the probe, which becomes the
    run's, and why those before it were rejected.

    ``network`` makes what the probe covers, as a runtime computes it.
    """
    integers = {name: x.to(run.device) for name, x in integers.items()}

    def attempt(name: str) -> tuple[str, dict[nn.Module, Callable]]:
        options = select_options(name, run.config.backend_options)
        forwards = build_forwards(name, modules, integers, **options)
        if probe is not None:
            with evaluating(modules):
                place = torch.device(run.device)
                prove(name, probe, network(forwards), place)
        return name, forwards

    names = candidates(run.config.backend, run.device)
    # Processes on other machines may have rejected more runtimes.
    start = max(distributed.gathered(names.index(run.backend)))
    (chosen, forwards), reasons = first_right(
        names[start:], distributed.together(attempt), run.device
    )
    change_runtime(run, chosen, reasons)
    return forwards, reasons


def change_runtime(run: "Run", chosen: str, reasons: Sequence[str]) -> None:
    """Change the runtime, and report why others were rejected."""
    if chosen != run.backend:
        before = _seven_bits_notes(run.backend, run.config)
        kept = [text for text in run.warnings if text not in before]
        run.warnings[:] = kept + _seven_bits_notes(chosen, run.config)
        run.backend = chosen
    run.warnings += [f"Not executed by {reason}." for reason in reasons]
