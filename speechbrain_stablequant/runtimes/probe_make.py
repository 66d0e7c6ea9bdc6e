"""Makes a probe: measures a network's answers and how far they move."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..core.integer_layer import IntegerLayer
from ..model.layers import Encoder, find_encoders
from .probe import PLACES, Answer, Probe
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

#: Number of perturbed inputs, relative perturbation, and number of passes with
#: outputs rounded to bfloat16.
DISTURBED, DISTURBANCE, ROUNDED = 3, 1e-6, 4

#: Maximum bytes in a file of the values of each output.
_MOST_BYTES = {"encoder": 3 << 14, "head": 1 << 14}


def make_probe(
    forms: Mapping[str, Compute],
    modules: Mapping[str, nn.Module],
    frames: Callable[[int], int],
    rate: int,
    device: str | torch.device = "cpu",
) -> Probe:
    """Measure the answers of a network.

    ``forms`` holds the float32 simulation by form of its weights; outputs of
    ``modules`` are rounded to measure the tolerance. Raises ValueError if an
    output is not finite.
    """
    wave, lengths = utterances(rate)
    every = torch.tensor(
        [
            (i, t)
            for i, count in enumerate(lengths.tolist())
            for t in range(frames(count))
        ]
    )
    probe = None
    for form, compute in forms.items():
        outputs = run_network(compute, float_waves(wave), lengths, device)
        if probe is None:
            hidden, labels = outputs
            rows = every[_spread(len(every), hidden.shape[2], "encoder")]
            picked = torch.arange(0)
            if labels is not None:
                picked = _spread(*labels.shape[1:], "head")
            probe = Probe(wave, lengths, rows, picked)
        values = probe.places(*outputs)
        groups = _disturbed(probe, compute, modules, device)
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


def _spread(rows: int, channels: int, place: str) -> torch.Tensor:
    """Evenly spaced rows from the first to the last, as many as fit into a
    file."""
    count = min(rows, max(_MOST_BYTES[place] // (2 * channels), 2))
    return (
        torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long()
    )


def _disturbed(
    probe: Probe,
    compute: Compute,
    modules: Mapping[str, nn.Module],
    device: str | torch.device,
) -> list[list[dict[str, torch.Tensor]]]:
    """Values by place for perturbed inputs, and with rounding inside."""
    wavs = float_waves(probe.wave)

    def computed(many: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        copies = len(many) // len(wavs)
        lengths = probe.lengths.repeat(copies)
        hidden, labels = run_network(compute, many, lengths, device)
        heads = [None] * copies if labels is None else labels.chunk(copies)
        return list(map(probe.places, hidden.chunk(copies), heads))

    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(
        (DISTURBED, *wavs.shape), generator=generator, device="cpu"
    )
    groups = [computed((wavs * (1 + DISTURBANCE * noise)).flatten(0, 1))]
    with rounded_outputs(modules, generator):
        return [*groups, computed(wavs.repeat(ROUNDED, 1))]


@contextmanager
def rounded_outputs(
    modules: Mapping[str, nn.Module], generator: torch.Generator
) -> Iterator[None]:
    """Context in which outputs of modules are rounded to bfloat16, up or
    down at random: twice the error of rounding to nearest, an upper bound
    for a runtime's own rounding."""
    unit = torch.finfo(torch.bfloat16).eps / 2

    def rounded(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(rounded, value))
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        chance = torch.rand(value.shape, generator=generator, device="cpu")
        chance = chance.mul_(2).sub_(1).mul_(unit).add_(1)
        return (value * chance.to(value.device)).bfloat16().float()

    with ExitStack() as stack:
        for module in modules.values():
            for part in module.modules():
                handle = part.register_forward_hook(
                    lambda module, args, output: rounded(output)
                )
                stack.callback(handle.remove)
        yield


def simulated_probe(
    parts: Mapping[str, nn.Module],
    integers: Mapping[str, IntegerLayer],
    use_lengths: bool,
    rate: int,
) -> Probe:
    """The probe of a recognizer, from its simulation on the CPU; ``parts``
    and ``use_lengths`` as of :func:`chain`."""
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
    """The probe of an encoder alone, from the simulation of a live model."""
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
