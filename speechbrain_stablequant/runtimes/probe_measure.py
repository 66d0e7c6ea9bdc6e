"""Makes a probe: measures a network's answers and how far they move."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..core.integer_layer import IntegerLayer
from ..model.layers import Encoder, find_encoders
from .probe import PLACES, Probe
from .probe_answer import Answer
from .probe_input import float_waves, utterances
from .probe_networks import (
    OWN,
    SEVEN_BITS,
    Compute,
    chain,
    encoder_alone,
    run_network,
    weight_forms,
)
from .simulated import simulated_forwards

#: Inputs that are disturbed, and by how much, and times that everything is
#: rounded to bfloat16.
DISTURBED, DISTURBANCE, ROUNDED = 3, 1e-6, 4

#: Bytes of the values of an encoder's and of a head's output in a file.
_MOST_BYTES = {"encoder": 3 << 14, "head": 1 << 14}


def make_probe(
    forms: Mapping[str, Compute],
    modules: Mapping[str, nn.Module],
    frames: Callable[[int], int],
    rate: int,
    device: str | torch.device = "cpu",
) -> Probe:
    """Measures the answers of a network.

    Arguments
    ---------
    forms : Mapping
        The simulated network by form of its weights, in float32.
    modules : Mapping
        The modules that it is made of, by key: their outputs are rounded.
    frames : callable
        Frames that the encoder makes of so many samples.
    rate : int
        Samples in a second.
    device : str or torch.device
        Where it computes.

    Returns
    -------
    Probe

    Raises
    ------
    ValueError
        The network gives something that is not finite.
    """
    wave, lengths = utterances(rate)
    device = torch.device(device)
    every = torch.tensor(
        [
            (i, t)
            for i, count in enumerate(lengths.tolist())
            for t in range(frames(count))
        ]
    )
    probe = Probe(wave, lengths, every, torch.arange(0), {})
    for form, compute in forms.items():
        wavs = float_waves(wave)
        hidden, labels = run_network(compute, wavs, lengths, device)
        if not probe.answers:
            probe = _with_rows(probe, hidden, labels)
        values = probe.places(hidden, labels)
        groups = [
            [probe.places(*part) for part in group]
            for group in _disturbed(compute, modules, wavs, lengths, device)
        ]
        for place, value in values.items():
            if not value.isfinite().all():
                raise ValueError(
                    f"{PLACES[place]} is not finite where the quantized model "
                    "is given generated speech; quantize it another way"
                )
        probe.answers[form] = {
            place: Answer.measured(
                value, [[other[place] for other in group] for group in groups]
            )
            for place, value in values.items()
        }
    return probe


def _with_rows(
    probe: Probe, hidden: torch.Tensor, labels: torch.Tensor | None
) -> Probe:
    """A probe with as many rows as there is room for in a file."""
    chosen = _spread(len(probe.frames), hidden.shape[2], "encoder")
    picked = torch.arange(0)
    if labels is not None:
        picked = _spread(labels.shape[1], labels.shape[2], "head")
    return Probe(
        probe.wave, probe.lengths, probe.frames[chosen], picked, probe.answers
    )


def _spread(rows: int, channels: int, place: str) -> torch.Tensor:
    """Rows from the first to the last, evenly."""
    count = min(rows, max(_MOST_BYTES[place] // (2 * channels), 2))
    return (
        torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long()
    )


def _disturbed(
    compute: Compute,
    modules: Mapping[str, nn.Module],
    wavs: torch.Tensor,
    lengths: torch.Tensor,
    device: torch.device,
) -> list[list[tuple[torch.Tensor, torch.Tensor | None]]]:
    """What a network gives for disturbed inputs, and when it rounds."""
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(
        (DISTURBED, *wavs.shape), generator=generator, device="cpu"
    )
    many = (wavs * (1 + DISTURBANCE * noise)).flatten(0, 1)
    out = run_network(compute, many, lengths.repeat(DISTURBED), device)
    groups = [list(_parts(out, len(wavs)))]
    many = wavs.repeat(ROUNDED, 1)
    with rounded_outputs(modules, generator):
        out = run_network(compute, many, lengths.repeat(ROUNDED), device)
    return [*groups, list(_parts(out, len(wavs)))]


def _parts(
    outputs: tuple[torch.Tensor, torch.Tensor | None], count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """A batch of several pairs of utterances as these pairs."""
    hidden, labels = outputs
    for start in range(0, len(hidden), count):
        rows = slice(start, start + count)
        yield hidden[rows], None if labels is None else labels[rows]


@contextmanager
def rounded_outputs(
    modules: Mapping[str, nn.Module], generator: torch.Generator
) -> Iterator[None]:
    """Context in which what modules give is rounded to bfloat16, up or down
    by chance where it is between: twice the error of the nearest, for all
    that a runtime may round on its way.

    Arguments
    ---------
    modules : Mapping
        Modules by key; theirs and those inside of them.
    generator : torch.Generator
        Of the chance, on the CPU.

    Example
    -------
    >>> linear = nn.Linear(1, 1)
    >>> with rounded_outputs({"a": linear}, torch.Generator()):
    ...     y = linear(torch.ones(1))
    >>> bool(y == y.bfloat16())
    True
    """
    unit = torch.finfo(torch.bfloat16).eps / 2

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(map(rounded, value))
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        chance = torch.rand(value.shape, generator=generator, device="cpu")
        chance = chance.mul_(2).sub_(1).mul_(unit).add_(1)
        return (value * chance.to(value.device)).bfloat16().float()

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        return rounded(output)

    with ExitStack() as stack:
        for module in modules.values():
            for part in module.modules():
                handle = part.register_forward_hook(hook)
                stack.callback(handle.remove)
        yield


def simulated_probe(
    parts: Mapping[str, nn.Module],
    integers: Mapping[str, IntegerLayer],
    use_lengths: bool,
    rate: int,
) -> Probe:
    """The probe of a recognizer, by its simulation.

    Arguments
    ---------
    parts : Mapping
        As of :func:`chain`, with their float parameters, on the CPU.
    integers : Mapping
        Integer layers by name.
    use_lengths : bool
        As of :func:`chain`.
    rate : int
        Samples in a second.

    Returns
    -------
    Probe
    """
    (encoder,) = find_encoders(dict(list(parts.items())[:1]))
    forms = {
        form: chain(parts, use_lengths, simulated_forwards(parts, layers))
        for form, layers in weight_forms(integers).items()
    }
    return make_probe(forms, parts, encoder.frames, rate)


def encoder_probe(
    encoder: Encoder,
    integers: Mapping[str, IntegerLayer],
    rate: int,
    device: str | torch.device,
    forms: Collection[str] = (OWN, SEVEN_BITS),
) -> Probe:
    """The probe of an encoder alone, by the simulation of a live model.

    Arguments
    ---------
    encoder : Encoder
        The encoder.
    integers : Mapping
        Integer layers by name; those outside of the encoder are not used.
    rate : int
        Samples in a second.
    device : str or torch.device
        Where the model is.
    forms : collection of str
        The forms of the weights that may be executed.

    Returns
    -------
    Probe
    """
    inside = {
        name: layer.to(device)
        for name, layer in integers.items()
        if name.startswith(f"{encoder.path}.")
    }
    modules = {encoder.path: encoder.model}
    networks = {
        form: encoder_alone(encoder.model, simulated_forwards(modules, layers))
        for form, layers in weight_forms(inside).items()
        if form in forms or form == OWN
    }
    return make_probe(networks, modules, encoder.frames, rate, device)
