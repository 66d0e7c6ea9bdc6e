"""Makes a probe: generates speech-like sound, and measures what a network
answers to it and how far the answers move."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..core.integer_layer import IntegerLayer
from ..core.layer_quant import LayerQuant
from ..core.quantize_layer import integer_layer
from ..model.encoders import Encoder, find_encoders
from ..model.layer import Layer
from ..model.layers import visible_layers
from ..utils.patching import hooked, shadowed
from .cpu import narrowed
from .probe import (
    OWN,
    PLACES,
    SEVEN_BITS,
    Answer,
    Compute,
    Probe,
    chain,
    encoder_alone,
    float_waves,
    run_network,
    snippet_run,
)
from .simulated import simulated_forwards
from .snippets import (
    ALLOWED,
    COUNT,
    STEP,
    Snippets,
    answers_of,
    distances,
)

#: Number of perturbed inputs, relative perturbation, and number of passes with
#: outputs rounded to bfloat16.
DISTURBED, DISTURBANCE, ROUNDED = 3, 1e-6, 4

#: Short utterances that are tried in turns, and their frames: attention needs
#: two.
_TURNS, _TRIED, _SHORT_FRAMES = 5, 48, 2

#: Passes with relative noise that they must endure: eight roundings to float32.
_PASSES, _NOISE = 3, 2.0**-20

#: Maximum bytes in a file of the values of each output.
_MOST_BYTES = {"encoder": 3 << 14, "head": 1 << 14}

#: Range of an input that is all zeros.
_LEAST_RANGE = 1e-6

#: Length of each utterance; the second one is padded.
SECONDS = (0.6, 0.36)

# (first, second, third) formant of five vowels in Hz; weights and widths.
_VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
)

_FORMANTS = ((1.0, 60.0), (0.6, 90.0), (0.3, 150.0))


def speech_like(samples: int, rate: int, seed: int) -> torch.Tensor:
    """Generated sound with the pitch, formants and syllables of speech,
    int16 [samples]."""
    time = torch.arange(samples, dtype=torch.float64) / rate
    pitch = 130 + 25 * torch.sin(2 * math.pi * 1.7 * time + seed) - 20 * time
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / rate
    place = 5 * time + seed
    vowel = place.floor().long()
    blend = 0.5 - 0.5 * torch.cos(math.pi * (place - vowel))
    table = torch.tensor(_VOWELS, dtype=torch.float64)
    this, following = (table[(vowel + i) % len(table)] for i in (0, 1))
    formants = this + (following - this) * blend[:, None]
    voiced = torch.zeros_like(time)
    for harmonic in range(1, 31):
        frequency = harmonic * pitch
        gain = sum(
            weight / (1 + ((frequency - formants[:, i]) / width) ** 2)
            for i, (weight, width) in enumerate(_FORMANTS)
        )
        audible = frequency < 0.45 * rate
        voiced += gain * torch.sin(harmonic * phase) * audible
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(samples, generator=generator, dtype=torch.float64)
    noise = noise - F.pad(noise, (1, 0))[:-1]
    syllable = torch.sin(math.pi * place).abs()
    breath = 0.35 * (1 - syllable) ** 2 + 0.002
    wave = voiced * syllable + breath * noise
    return (wave / wave.abs().max() * 16384).round().to(torch.int16)


def utterances(rate: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The utterances of a probe, int16 [utterances, samples], and their
    lengths, int64 [utterances]."""
    counts = [round(seconds * rate) for seconds in SECONDS]
    wave = torch.zeros(len(counts), max(counts), dtype=torch.int16)
    for seed, (row, count) in enumerate(zip(wave, counts, strict=True)):
        row[:count] = speech_like(count, rate, seed)
    return wave, torch.tensor(counts)


@contextmanager
def evaluating(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context with modules in evaluation mode."""
    with ExitStack() as stack:
        for module in modules.values():
            for part in module.modules():
                stack.enter_context(shadowed(part, "training", False))
        yield


def quick_integers(
    encoder: Encoder,
    layers: Iterable[Layer],
    bits: tuple[int, int],
    rate: int,
    device: str | torch.device,
) -> dict[str, IntegerLayer]:
    """Integers of an encoder, calibrated on a probe's utterances: enough to
    try a runtime before there is a plan. ``bits``: of weights and
    activations."""
    inside = [x for x in layers if x.name.startswith(f"{encoder.path}.")]
    ranges: dict[str, float] = {}

    def observe(name: str, module: nn.Module, args: tuple) -> None:
        found = float(args[0].abs().max())
        ranges[name] = max(ranges.get(name, _LEAST_RANGE), found)

    wave, lengths = utterances(rate)
    alone = encoder_alone(encoder.model, {})
    hooks = ((x.module, partial(observe, x.name)) for x in inside)
    with visible_layers(inside), hooked(hooks):
        run_network(alone, float_waves(wave), lengths, device)
    return {
        x.name: integer_layer(x, LayerQuant(*bits, ranges[x.name])).to("cpu")
        for x in inside
        if x.name in ranges
    }


def weight_forms(
    integers: Mapping[str, IntegerLayer],
) -> dict[str, dict[str, IntegerLayer]]:
    """The integers that runtimes may execute, by form and layer name;
    ``SEVEN_BITS`` only where it differs from ``OWN``."""
    seven = {name: narrowed(layer) for name, layer in integers.items()}
    forms = {OWN: dict(integers)}
    if any(seven[name] is not layer for name, layer in integers.items()):
        forms[SEVEN_BITS] = seven
    return forms


def make_probe(
    forms: Mapping[str, Compute],
    modules: Mapping[str, nn.Module],
    frames: Callable[[int], int] | None,
    rate: int,
    device: str | torch.device = "cpu",
) -> Probe:
    """Measure the answers of a network.

    ``forms`` holds the float32 simulation by form of its weights; outputs of
    ``modules`` are rounded to measure the tolerance. Without ``frames``, an
    utterance has its share of the output's. Raises ValueError if an output is
    not finite.
    """
    wave, lengths = utterances(rate)
    outputs = {
        form: run_network(compute, float_waves(wave), lengths, device)
        for form, compute in forms.items()
    }
    hidden, labels = outputs[OWN]
    share = hidden.shape[1] / wave.shape[1]
    frames_of = frames or (lambda samples: max(int(samples * share), 1))
    counts = enumerate(map(frames_of, lengths.tolist()))
    every = torch.tensor([(i, t) for i, count in counts for t in range(count)])
    rows = every[_spread(len(every), hidden.shape[2], "encoder")]
    picked = torch.arange(0)
    if labels is not None:
        picked = _spread(*labels.shape[1:], "head")
    probe = Probe(wave, lengths, rows, picked)
    for form, compute in forms.items():
        values = probe.places(*outputs[form])
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
        snippets = frames and _snippets(compute, modules, frames, rate, device)
        if snippets:
            probe.snippets[form] = snippets
    return probe


def _snippets(
    compute: Compute,
    modules: Mapping[str, nn.Module],
    frames: Callable[[int], int],
    rate: int,
    device: str | torch.device,
) -> Snippets | None:
    """Short utterances whose answers endure noise; None without enough."""
    samples = next(n for n in itertools.count(1) if frames(n) >= _SHORT_FRAMES)
    run = snippet_run(compute, device)
    generator = torch.Generator("cpu").manual_seed(0)

    def enduring(wave: torch.Tensor) -> tuple[tuple, list[torch.Tensor]]:
        """Those that endure, and their answers by place."""
        answers = answers_of(run, wave)
        kept = [wave, *answers.values()]
        for _ in range(_PASSES):
            if not len(kept[0]):
                break
            with rounded_outputs(modules, generator, _NOISE, torch.float32):
                found = answers_of(run, kept[0]).values()
            off = map(distances, found, kept[1:])
            good = torch.stack(list(off)).amax(0) < ALLOWED
            kept = [x[good] for x in kept]
        return tuple(answers), kept

    sound = speech_like(_TURNS * _TRIED * samples, rate, len(SECONDS))
    waves = (sound / STEP).round().clamp(-127, 127).to(torch.int8)
    turns = []
    for wave in waves.view(_TURNS, _TRIED, samples):
        places, kept = enduring(wave)
        turns.append(kept)
        most = sum(len(kept[0]) for kept in turns)
        if most >= COUNT:
            break
        # Deep networks have next to none.
        if most * _TURNS < COUNT // 2:
            return None
    if most < COUNT:
        return None
    wave, *values = (torch.cat(x)[:COUNT] for x in zip(*turns, strict=True))
    return Snippets(wave, dict(zip(places, values, strict=True)))


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
    modules: Mapping[str, nn.Module],
    generator: torch.Generator,
    unit: float = torch.finfo(torch.bfloat16).eps / 2,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[None]:
    """Context in which outputs of modules are rounded to a type, up or down
    at random: twice the error of rounding to nearest, an upper bound for a
    runtime's own rounding."""

    def rounded(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(rounded, value))
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        chance = torch.rand(value.shape, generator=generator, device="cpu")
        chance = chance.mul_(2).sub_(1).mul_(unit).add_(1)
        return (value * chance.to(value.device)).to(dtype).float()

    hooks = (
        (part, lambda module, args, output: rounded(output))
        for module in modules.values()
        for part in module.modules()
    )
    with hooked(hooks, after=True):
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
