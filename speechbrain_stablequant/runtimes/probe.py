"""A short input with a known answer: a runtime proves itself where it runs.

Another CPU, card or release of a library may compute something else without
a word. So a model carries a probe: two short utterances of generated sound
that resembles speech, and what the plan's simulation in float32 answers. A
runtime computes it once when it is made, and is not used if it answers
something else.

Quantized networks are chaotic: a value at a tie that rounds the other way
moves everything behind it, by about as much as all roundings together. So how
far an answer may be off is measured with it: on inputs that are disturbed in
their last bits, and with everything between the products rounded to bfloat16
as coarsely as a runtime may. The distance is taken over all values, over each
channel and over each frame, so that one wrong row of a weight and one wrong
frame at an end are seen as well.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..core.integer_layer import IntegerLayer, integer_layer
from ..core.plan import LayerQuant
from ..model.layers import Encoder, Layer, find_encoders
from ..utils.precision import plain_float32
from .base import shadowed_forwards
from .cpu import CpuClass, executed_layer
from .simulated import simulated_forwards

#: Samples relative to a second of each utterance; the second one is padded.
SECONDS = (0.6, 0.36)

#: Names of the tensors in a file; no parameter of a module begins so.
PREFIX = ".probe."

#: The plan's own integers, and those of a CPU that multiplies 7-bit weights.
OWN, SEVEN_BITS = "own", "seven"

#: Times the largest distance that was measured. Healthy runtimes stay below
#: 0.9 of it, also in 16 bits.
TOTAL_FACTOR = 1.5
#: Times the mean distance of a channel or row. Healthy: below 1.9 of it.
PART_FACTOR = 2.75
#: Of the mean over all, added to the distance of a channel or frame.
PART_SHARE = 0.3
#: Of the answer's size: allowed in any case, for its storage in 16 bits.
FLOOR = 1e-3

#: Inputs that are disturbed, and by how much, and times that everything is
#: rounded to bfloat16.
DISTURBED, DISTURBANCE, ROUNDED = 3, 1e-6, 4

#: Bytes of the values of an encoder's and of a head's output in a file.
_MOST_BYTES = {"encoder": 3 << 14, "head": 1 << 14}
_WORDS = {"encoder": "the encoder's output", "head": "the head's output"}
#: Of an input that is all zeros.
_LEAST_RANGE = 1e-6
#: No probe has more values than this.
_MOST_VALUES = 1 << 20

# (first, second, third) formant of five vowels in Hz; weights and widths.
_VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
)
_FORMANTS = ((1.0, 60.0), (0.6, 90.0), (0.3, 150.0))

#: From float32 [batch, samples] and relative lengths [batch] to the encoder's
#: last hidden state [batch, frames, channels] and what the heads make of it
#: [batch, frames, labels], or None without heads.
Compute = Callable[
    [torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]
]


class ProbeError(ValueError):
    """A runtime computes something else than the plan says, in one line."""


def speech_like(samples: int, rate: int, seed: int) -> torch.Tensor:
    """Generated sound with the pitch, formants and syllables of speech.

    Arguments
    ---------
    samples : int
        Its length.
    rate : int
        Samples in a second.
    seed : int
        Chooses among several.

    Returns
    -------
    torch.Tensor
        int16 [samples].

    Example
    -------
    >>> speech_like(1600, 16000, 0).abs().max() > 16000
    tensor(True)
    """
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


# -- an answer, and how far another may be from it ----------------------------


@dataclass(frozen=True)
class Answer:
    """What one place of a network gives, and how far that moves.

    Arguments
    ---------
    values : torch.Tensor
        float32 [rows, channels].
    distance : torch.Tensor
        float32 scalar: the largest that was measured.
    channels, rows : torch.Tensor
        float32 [channels] and [rows]: root mean square of the distances of
        each.
    """

    values: torch.Tensor = field(repr=False)
    distance: torch.Tensor
    channels: torch.Tensor = field(repr=False)
    rows: torch.Tensor = field(repr=False)

    @classmethod
    def measured(
        cls, values: torch.Tensor, groups: list[list[torch.Tensor]]
    ) -> "Answer":
        """The answer of which others are disturbed copies, each group in
        another way: the way that disturbs most counts."""
        errors = [[other - values for other in group] for group in groups]

        def mean(axis: int) -> torch.Tensor:
            squares = [
                torch.stack([error.square().sum(axis) for error in group])
                for group in errors
            ]
            return torch.stack([x.mean(0) for x in squares]).amax(0).sqrt()

        largest = max(error.norm() for group in errors for error in group)
        return cls(values, largest, mean(0), mean(1))

    def compare(self, found: torch.Tensor) -> "Distance":
        """How far another result is from the answer.

        Arguments
        ---------
        found : torch.Tensor
            float32 [rows, channels].

        Returns
        -------
        Distance
            The largest relative to what is allowed.
        """
        if found.shape != self.values.shape:
            return Distance(
                math.inf,
                f"has shape {list(found.shape)} instead of "
                f"{list(self.values.shape)}",
            )
        if not found.isfinite().all():
            return Distance(math.inf, "is not finite")
        error, size = found - self.values, self.values.norm()
        allowed = TOTAL_FACTOR * self.distance + FLOOR * size
        distances = [Distance.of(error.norm(), allowed, size)]
        for axis, what in ((0, "channel"), (1, "row")):
            usual = self.channels if axis == 0 else self.rows
            sizes = self.values.square().sum(axis).sqrt()
            off = error.square().sum(axis).sqrt()
            allowed = PART_FACTOR * (usual + PART_SHARE * usual.mean())
            allowed = allowed + FLOOR * sizes.square().mean().sqrt()
            worst = int((off / allowed).nan_to_num(0.0).argmax())
            distance = Distance.of(
                off[worst], allowed[worst], sizes[worst], f" in {what} {worst}"
            )
            distances.append(distance)
        # The whole says more than one part of it.
        return next(
            (distance for distance in distances if distance.ratio > 1),
            max(distances, key=lambda distance: distance.ratio),
        )


@dataclass(frozen=True)
class Distance:
    """How far a result is from an answer.

    Arguments
    ---------
    ratio : float
        To what is allowed.
    text : str
        In words, without what it is of.
    """

    ratio: float
    text: str

    @classmethod
    def of(
        cls,
        off: torch.Tensor,
        allowed: torch.Tensor,
        size: torch.Tensor,
        where: str = "",
    ) -> "Distance":
        """A distance, where one is allowed, of something of a size."""
        percent = [
            f"{100 * float(x) / max(float(size), 1e-30):.3g} %"
            for x in (off, allowed)
        ]
        text = f"is off by {percent[0]}{where}, {percent[1]} is allowed"
        ratio = float(off) / max(float(allowed), 1e-30)
        return cls(ratio, text)


# -- the probe ----------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Two utterances and their answers.

    Arguments
    ---------
    wave : torch.Tensor
        int16 [utterances, samples].
    lengths : torch.Tensor
        int64 [utterances], real samples.
    frames : torch.Tensor
        int64 [rows, 2]: utterance and frame of each row of the encoder's
        answers.
    labels : torch.Tensor
        int64 [rows]: frame of the first utterance of each row of the head's;
        the padding changes what a head sees in the others.
    answers : dict
        Answer by form of the weights (``OWN``, ``SEVEN_BITS``) and place
        (``"encoder"``, ``"head"``).
    """

    wave: torch.Tensor = field(repr=False)
    lengths: torch.Tensor = field(repr=False)
    frames: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)
    answers: dict[str, dict[str, Answer]]

    def compare(
        self, compute: Compute, form: str, device: str | torch.device
    ) -> dict[str, Distance]:
        """How far a runtime is from the answers.

        Arguments
        ---------
        compute : callable
            The network as the runtime computes it.
        form : str
            ``OWN`` or ``SEVEN_BITS``: the weights that it executes.
        device : str or torch.device
            Where it computes.

        Returns
        -------
        dict
            Distance by place, the encoder's output first.
        """
        answers = self.answers.get(form) or self.answers[OWN]
        hidden, labels = _run(
            compute, _floats(self.wave), self.lengths, torch.device(device)
        )
        return {
            place: answers[place].compare(found)
            for place, found in self._places(hidden, labels).items()
            if place in answers
        }

    def difference(
        self, compute: Compute, form: str, device: str | torch.device
    ) -> str | None:
        """Why a runtime computes something else.

        Arguments
        ---------
        compute, form, device
            As of :meth:`compare`.

        Returns
        -------
        str or None
            Where it differs, by how much, and what is allowed; None if it
            does not.
        """
        for place, distance in self.compare(compute, form, device).items():
            if distance.ratio > 1:
                return f"{_WORDS[place]} {distance.text}"
        return None

    def _places(
        self, hidden: torch.Tensor, labels: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The rows that are compared."""
        utterance, frame = self.frames.unbind(1)
        found = {"encoder": hidden[utterance, frame]}
        if labels is not None:
            rows = labels[0, self.labels]
            # Log probabilities and their logits are the same here.
            found["head"] = rows - rows.mean(-1, keepdim=True)
        return found

    # -- in a file -----------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored of it, by name."""
        named = {key: getattr(self, key) for key in _PARTS}
        for form, places in self.answers.items():
            for place, answer in places.items():
                for part in fields(Answer):
                    name = f"{form}.{place}.{part.name}"
                    named[name] = getattr(answer, part.name)
        return {
            f"{PREFIX}{name}": _stored(name, x) for name, x in named.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Probe":
        """The probe that was stored.

        Arguments
        ---------
        tensors : Mapping
            As :meth:`tensors` gives them.

        Raises
        ------
        ValueError
            They are not those of a probe.
        """
        left = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in tensors.items()
        }
        shapes = {"wave": (2, None), "lengths": (2,)}
        shapes |= {"frames": (None, 2), "labels": (None,)}
        parts = {key: _take(left, key, shapes[key]) for key in _PARTS}
        rows = {"encoder": len(parts["frames"]), "head": len(parts["labels"])}
        answers: dict[str, dict[str, Answer]] = {}
        for name in sorted(left):
            form, place, part = (*name.split("."), "", "")[:3]
            if form not in (OWN, SEVEN_BITS) or place not in rows:
                raise ValueError(f"the probe has no part '{name}'")
            if part == "values":
                count = rows[place]
                values = _take(left, name, (count, None)).float()
                shapes = {"distance": (), "rows": (count,)}
                shapes["channels"] = (values.shape[1],)
                answers.setdefault(form, {})[place] = Answer(
                    values,
                    **{
                        key: _take(left, f"{form}.{place}.{key}", shape)
                        for key, shape in shapes.items()
                    },
                )
        if left or "encoder" not in answers.get(OWN, {}):
            raise ValueError("the probe is not complete")
        probe = cls(answers=answers, **parts)
        probe._check()
        return probe

    def _check(self) -> None:
        """Raises if indices lead out of their tensors."""
        samples = self.wave.shape[1]
        good = bool((self.lengths > 0).all())
        good = good and int(self.lengths.max()) == samples
        for index, end in (
            (self.frames[:, 0], 2),
            (self.frames[:, 1], samples),
            (self.labels, samples),
        ):
            good = good and bool(((index >= 0) & (index < end)).all())
        for places in self.answers.values():
            for answer in places.values():
                for part in fields(Answer):
                    values = getattr(answer, part.name)
                    good = good and bool(values.isfinite().all())
        if not good:
            raise ValueError("the probe is not consistent")


_PARTS = ("wave", "lengths", "frames", "labels")
_DTYPES = {"wave": torch.int16}


def check_size(tensors: Iterable[torch.Tensor]) -> None:
    """Raises if the tensors of a probe have more values than any has.

    Arguments
    ---------
    tensors : iterable of torch.Tensor
        They may be on the ``meta`` device.

    Raises
    ------
    ValueError
        They have.

    Example
    -------
    >>> check_size([torch.empty(1 << 40, device="meta")])
    Traceback (most recent call last):
    ValueError: the probe has too many values
    """
    if sum(tensor.numel() for tensor in tensors) > _MOST_VALUES:
        raise ValueError("the probe has too many values")


def _stored(name: str, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().cpu()
    if name.endswith(".values"):
        half = x.half()
        x = half if half.isfinite().all() else x
    return x.contiguous()


def _take(
    left: dict[str, torch.Tensor], name: str, shape: tuple[int | None, ...]
) -> torch.Tensor:
    """Takes a tensor out, if it is as expected."""
    x = left.pop(name, None)
    if x is None:
        raise ValueError(f"the probe has no part '{name}'")
    fits = len(x.shape) == len(shape) and all(
        size in (None, found)
        for size, found in zip(shape, x.shape, strict=True)
    )
    floats = (torch.float16, torch.float32)
    expected = (_DTYPES.get(name, torch.int64),) if name in _PARTS else floats
    if not fits or x.dtype not in expected or 0 in x.shape:
        raise ValueError(f"the probe's part '{name}' is {list(x.shape)}")
    return x


def _floats(wave: torch.Tensor) -> torch.Tensor:
    return wave.float() / 32768


def utterances(rate: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two utterances of a probe.

    Arguments
    ---------
    rate : int
        Samples in a second.

    Returns
    -------
    torch.Tensor
        int16 [utterances, samples].
    torch.Tensor
        int64 [utterances], real samples.
    """
    counts = [round(seconds * rate) for seconds in SECONDS]
    wave = torch.zeros(len(counts), max(counts), dtype=torch.int16)
    for seed, (row, count) in enumerate(zip(wave, counts, strict=True)):
        row[:count] = speech_like(count, rate, seed)
    return wave, torch.tensor(counts)


# -- making one ---------------------------------------------------------------


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
        wavs = _floats(wave)
        hidden, labels = _run(compute, wavs, lengths, device)
        if not probe.answers:
            probe = _with_rows(probe, hidden, labels)
        values = probe._places(hidden, labels)
        groups = [
            [probe._places(*part) for part in group]
            for group in _disturbed(compute, modules, wavs, lengths, device)
        ]
        for place, value in values.items():
            if not value.isfinite().all():
                raise ValueError(
                    f"{_WORDS[place]} is not finite where the quantized model "
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
    out = _run(compute, many, lengths.repeat(DISTURBED), device)
    groups = [list(_parts(out, len(wavs)))]
    many = wavs.repeat(ROUNDED, 1)
    with rounded_outputs(modules, generator):
        out = _run(compute, many, lengths.repeat(ROUNDED), device)
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


@contextmanager
def _undisturbing(wavs: torch.Tensor) -> Iterator[None]:
    """Context that leaves no trace: no gradients, the random numbers as they
    were, and float32 whatever the recipe computes in."""
    cuda = [wavs.device] if wavs.is_cuda else []
    with (
        torch.no_grad(),
        torch.random.fork_rng(cuda),
        plain_float32(wavs),
    ):
        yield


def _run(
    compute: Compute,
    wavs: torch.Tensor,
    lengths: torch.Tensor,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A network's outputs, float32 on the CPU."""
    wavs = wavs.to(device)
    relative = (lengths / wavs.shape[1]).to(device)
    with _undisturbing(wavs):
        hidden, labels = compute(wavs, relative)
        return (
            hidden.float().cpu(),
            None if labels is None else labels.float().cpu(),
        )


@contextmanager
def evaluating(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context in which modules are in evaluation mode.

    Arguments
    ---------
    modules : Mapping
        Modules by key.

    Example
    -------
    >>> linear = nn.Linear(1, 1)
    >>> with evaluating({"a": linear}):
    ...     linear.training
    False
    >>> linear.training
    True
    """
    every = [part for module in modules.values() for part in module.modules()]
    training = [part for part in every if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


# -- networks -----------------------------------------------------------------


def chain(
    parts: Mapping[str, nn.Module],
    use_lengths: bool,
    forwards: Mapping[nn.Module, Callable[..., Any]],
) -> Compute:
    """An encoder's wrapper and the heads behind it, as a runtime computes
    them.

    Arguments
    ---------
    parts : Mapping
        The wrapper, whose attribute ``model`` is the encoder, and the heads
        in order.
    use_lengths : bool
        Whether the wrapper is told what is padding.
    forwards : Mapping
        Forward by module.

    Returns
    -------
    callable
        As :data:`Compute`.
    """
    wrapper, *heads = parts.values()
    model = wrapper.model

    def compute(
        wavs: torch.Tensor, relative: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = []
        handle = model.register_forward_hook(
            lambda module, args, output: kept.append(output.last_hidden_state)
        )
        try:
            with shadowed_forwards(forwards):
                x = wrapper(wavs, relative if use_lengths else None)
                for head in heads:
                    x = head(x)
        finally:
            handle.remove()
        return kept[-1], x

    return compute


def encoder_alone(
    model: nn.Module, forwards: Mapping[nn.Module, Callable[..., Any]]
) -> Compute:
    """An encoder without what is around it, as a runtime computes it.

    Arguments
    ---------
    model : torch.nn.Module
        The encoder.
    forwards : Mapping
        Forward by module.

    Returns
    -------
    callable
        As :data:`Compute`.
    """

    def compute(
        wavs: torch.Tensor, relative: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        samples = wavs.shape[1]
        real = (relative * samples).round()
        place = torch.arange(samples, device=wavs.device)
        mask = (place < real[:, None]).long()
        wavs = F.layer_norm(wavs, wavs.shape[1:])
        with shadowed_forwards(forwards):
            return model(wavs, attention_mask=mask).last_hidden_state, None

    return compute


@contextmanager
def _observed(
    layers: Iterable[Layer], ranges: dict[str, float]
) -> Iterator[None]:
    """Context in which the largest magnitude of each layer's input is noted."""

    def hook(name: str) -> Callable[[nn.Module, tuple], None]:
        def note(module: nn.Module, args: tuple) -> None:
            found = float(args[0].abs().max())
            ranges[name] = max(ranges.get(name, 0.0), found)

        return note

    with ExitStack() as stack:
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(hook(layer.name))
            stack.callback(handle.remove)
        yield


def quick_integers(
    encoder: Encoder,
    layers: Iterable[Layer],
    bits: tuple[int, int],
    rate: int,
    device: str | torch.device,
) -> dict[str, IntegerLayer]:
    """An encoder in integers, by the largest values that the utterances of a
    probe bring: what a runtime can be tried with before there is a plan.

    Arguments
    ---------
    encoder : Encoder
        The float model.
    layers : iterable of Layer
        What is to be quantized; layers outside of the encoder are left out.
    bits : tuple of int
        Of weights and activations.
    rate : int
        Samples in a second.
    device : str or torch.device
        Where the model is.

    Returns
    -------
    dict
        Integer layers by name, on the CPU.
    """
    inside = [x for x in layers if x.name.startswith(f"{encoder.path}.")]
    ranges: dict[str, float] = {}
    wave, lengths = utterances(rate)
    with _observed(inside, ranges):
        alone = encoder_alone(encoder.model, {})
        _run(alone, _floats(wave), lengths, torch.device(device))
    return {
        x.name: integer_layer(
            x, LayerQuant(*bits, max(ranges[x.name], _LEAST_RANGE))
        ).to("cpu")
        for x in inside
        if x.name in ranges
    }


def weight_forms(
    integers: Mapping[str, IntegerLayer],
) -> dict[str, dict[str, IntegerLayer]]:
    """What runtimes may execute in the place of a plan's integers.

    Arguments
    ---------
    integers : Mapping
        Integer layers by name.

    Returns
    -------
    dict
        Integer layers by name, by form; ``SEVEN_BITS`` only where it is
        another than ``OWN``.
    """
    seven = {
        name: executed_layer(layer, CpuClass("avx2"))
        for name, layer in integers.items()
    }
    forms = {OWN: dict(integers)}
    if any(seven[name] is not layer for name, layer in integers.items()):
        forms[SEVEN_BITS] = seven
    return forms


# -- of simulations -----------------------------------------------------------


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
