"""A short input with a known answer: a runtime proves itself where it runs.

Another CPU, card or library release may compute something else silently. So a
model carries a probe: two short utterances, and what the plan's simulation in
float32 answers. A runtime computes it once when it is made, and is not used if
its answer differs by more than the measured tolerance.

Quantized networks are chaotic: a value at a tie that rounds the other way
changes everything after it. So the tolerance is measured: on inputs perturbed
in their last bits, and with everything between the products rounded to
bfloat16. The distance is taken over all values, over each channel and over
each frame, so that one wrong row of a weight and one wrong frame are seen too.

What drowns in that is found by very short utterances (see ``snippets``), where
the answer is exact. They are not for runtimes that round to 16 bits, nor for
networks that are too deep to have utterances without ties.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..utils.patching import shadowed_forwards
from ..utils.precision import plain_float32
from .answer import Answer, Distance, by_ratio
from .snippets import ALLOWED, Run, Snippets

#: From float32 [batch, samples] and relative lengths [batch] to the encoder's
#: last hidden state [batch, frames, channels] and the heads' output [batch,
#: frames, labels], or None without heads.
Compute = Callable[
    [torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]
]

#: The plan's integers, and those with 7-bit weights of a CPU without VNNI.
OWN, SEVEN_BITS = "own", "seven"

#: Prefix of the tensors in a file; no module parameter begins with it.
PREFIX = ".probe."

PLACES = {"encoder": "the encoder's output", "head": "the head's output"}

#: Of the names of the snippets' tensors.
_SHORT = "short"

#: Maximum number of values in a probe.
_MOST_VALUES = 1 << 20

#: Shape and dtype of the tensors beside the answers.
_PARTS = {
    "wave": ((2, None), torch.int16),
    "lengths": ((2,), torch.int64),
    "frames": ((None, 2), torch.int64),
    "labels": ((None,), torch.int64),
}


class ProbeError(ValueError):
    """A runtime's answer differs from the plan's; a one-line message."""


def float_waves(wave: torch.Tensor) -> torch.Tensor:
    return wave.float() / 32768


def run_network(
    compute: Compute,
    wavs: torch.Tensor,
    lengths: torch.Tensor,
    device: str | torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A network's outputs, float32 on the CPU; without gradients, in float32
    whatever precision the recipe uses, the random state preserved."""
    wavs = wavs.to(device)
    relative = (lengths / wavs.shape[1]).to(device)
    cuda = [wavs.device] if wavs.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(cuda), plain_float32(wavs):
        hidden, labels = compute(wavs, relative)
        labels = None if labels is None else labels.float().cpu()
        return hidden.float().cpu(), labels


def snippet_run(compute: Compute, device: str | torch.device) -> Run:
    """A network's computation of very short utterances."""

    def run(wave: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        lengths = torch.full((len(wave),), wave.shape[1])
        return run_network(compute, float_waves(wave), lengths, device)

    return run


def chain(
    parts: Mapping[str, nn.Module],
    use_lengths: bool,
    forwards: Mapping[nn.Module, Callable[..., Any]],
) -> Compute:
    """A runtime's computation of an encoder's wrapper (its ``model`` is the
    encoder) and the heads after it."""
    wrapper, *heads = parts.values()

    def compute(
        wavs: torch.Tensor, relative: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = []
        handle = wrapper.model.register_forward_hook(
            lambda module, args, output: kept.append(output.last_hidden_state)
        )
        with handle, shadowed_forwards(forwards):
            x = wrapper(wavs, relative if use_lengths else None)
            for head in heads:
                x = head(x)
        return kept[-1], x

    return compute


def encoder_alone(
    model: nn.Module, forwards: Mapping[nn.Module, Callable[..., Any]]
) -> Compute:
    """A runtime's computation of an encoder without its wrapper."""

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


@dataclass(frozen=True)
class Probe:
    """Two utterances and their answers."""

    wave: torch.Tensor = field(repr=False)  # int16 [utterances, samples]
    # int64 [utterances], real samples
    lengths: torch.Tensor = field(repr=False)
    # int64 [rows, 2]: utterance and frame of each row of the encoder's answers
    frames: torch.Tensor = field(repr=False)
    # int64 [rows]: frame of each row of the head's answers, in the first
    # utterance: padding changes what a head sees in the other
    labels: torch.Tensor = field(repr=False)
    # by form of the weights (OWN, SEVEN_BITS), then by place
    answers: dict[str, dict[str, Answer]] = field(default_factory=dict)
    # by form; none if the network has no utterances without ties
    snippets: dict[str, Snippets] = field(default_factory=dict)

    def compare(
        self,
        compute: Compute,
        form: str,
        device: str | torch.device,
        half: bool = False,
    ) -> dict[str, Distance]:
        """Distance by place of a runtime's results, the encoder's output
        first; ``half``: it rounds to 16 bits."""
        answers = self.answers.get(form) or self.answers[OWN]
        found = self.places(
            *run_network(compute, float_waves(self.wave), self.lengths, device)
        )
        distances = {
            place: answers[place].compare(values)
            for place, values in found.items()
            if place in answers
        }
        form = form if form in self.answers else OWN
        if form in self.snippets and not half:
            run = snippet_run(compute, device)
            for place, off in self.snippets[form].compare(run).items():
                distance = Distance(
                    off / ALLOWED,
                    f"is off by {100 * off:.3g} % in every short utterance, "
                    f"{100 * ALLOWED:.3g} % is allowed",
                )
                distances[place] = max(distances[place], distance, key=by_ratio)
        return distances

    def difference(
        self,
        compute: Compute,
        form: str,
        device: str | torch.device,
        half: bool = False,
    ) -> str | None:
        """Where a runtime's results differ, by how much, and what is
        allowed; None if they do not."""
        for place, distance in self.compare(
            compute, form, device, half
        ).items():
            if distance.ratio > 1:
                return f"{PLACES[place]} {distance.text}"
        return None

    def places(
        self, hidden: torch.Tensor, labels: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The rows that are compared, by place."""
        utterance, frame = self.frames.unbind(1)
        found = {"encoder": hidden[utterance, frame]}
        if labels is not None:
            rows = labels[0, self.labels]
            # Log probabilities and their logits are the same here.
            found["head"] = rows - rows.mean(-1, keepdim=True)
        return found

    # -- in a file -----------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        named = {key: getattr(self, key) for key in _PARTS}
        if "head" not in self.answers[OWN]:
            del named["labels"]
        for form, places in self.answers.items():
            for place, answer in places.items():
                for part in fields(Answer):
                    x = getattr(answer, part.name).cpu()
                    if part.name == "values" and x.half().isfinite().all():
                        x = x.half()
                    named[f"{form}.{place}.{part.name}"] = x
        for form, snippets in self.snippets.items():
            for part, x in snippets.tensors().items():
                named[f"{form}.{_SHORT}.{part}"] = x.cpu()
        return {f"{PREFIX}{name}": x.contiguous() for name, x in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Probe":
        """The inverse of :meth:`tensors`; ValueError if these are not a
        probe."""
        left = {name.removeprefix(PREFIX): x for name, x in tensors.items()}
        parts = {
            key: _take(left, key, shape, dtype)
            for key, (shape, dtype) in _PARTS.items()
            # A network without heads has no labels.
            if key in left or key != "labels"
        }
        parts.setdefault("labels", torch.arange(0))
        probe = cls(**parts)
        rows = {"encoder": len(probe.frames), "head": len(probe.labels)}
        for form, place in itertools.product((OWN, SEVEN_BITS), PLACES):
            start, count = f"{form}.{place}.", rows[place]
            if f"{start}values" in left:
                values = _take(left, f"{start}values", (count, None)).float()
                shapes = {"distance": (), "rows": (count,)}
                shapes["channels"] = (values.shape[1],)
                others = {
                    key: _take(left, f"{start}{key}", shape)
                    for key, shape in shapes.items()
                }
                places = probe.answers.setdefault(form, {})
                places[place] = Answer(values, **others)
        for form in probe.answers:
            start = f"{form}.{_SHORT}."
            names = [name for name in left if name.startswith(start)]
            if names:
                probe.snippets[form] = Snippets.from_tensors(
                    {name.removeprefix(start): left.pop(name) for name in names}
                )
        if left or "encoder" not in probe.answers.get(OWN, {}):
            raise ValueError("the probe is not complete")
        probe._check()
        return probe

    def _check(self) -> None:
        """Raise ValueError if an index is out of range or a value not
        finite."""
        samples = self.wave.shape[1]
        good = [self.lengths > 0, self.lengths.max() == samples]
        for index, end in (
            (self.frames[:, 0], 2),
            (self.frames[:, 1], samples),
            (self.labels, samples),
        ):
            good += [index >= 0, index < end]
        for places in self.answers.values():
            for answer in places.values():
                good += [x.isfinite() for x in vars(answer).values()]
        if not all(x.all() for x in good):
            raise ValueError("the probe is not consistent")


def check_size(tensors: Iterable[torch.Tensor]) -> None:
    """Raise ValueError if tensors have more values than any probe has."""
    if sum(tensor.numel() for tensor in tensors) > _MOST_VALUES:
        raise ValueError("the probe has too many values")


def _take(
    left: dict[str, torch.Tensor],
    name: str,
    shape: tuple[int | None, ...],
    *dtypes: torch.dtype,
) -> torch.Tensor:
    """Take out a tensor after checking its shape and dtype, by default that of
    an answer."""
    x = left.pop(name, None)
    if x is None:
        raise ValueError(f"the probe has no part '{name}'")
    fits = len(x.shape) == len(shape) and all(
        size in (None, found)
        for size, found in zip(shape, x.shape, strict=True)
    )
    expected = dtypes or (torch.float16, torch.float32)
    if not fits or x.dtype not in expected or 0 in x.shape:
        raise ValueError(f"the probe's part '{name}' is {list(x.shape)}")
    return x
