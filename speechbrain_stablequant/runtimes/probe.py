"""A short input with a known answer: a runtime proves itself where it runs.

Another CPU, card or library release may compute something else silently. So a
model carries a probe: two short utterances, and what the plan's simulation in
float32 answers. A runtime computes it once when it is made, and is not used if
its answer differs by more than the measured tolerance.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

import torch

from .probe_answer import Answer, Distance
from .probe_input import float_waves
from .probe_networks import OWN, SEVEN_BITS, Compute, run_network

#: Prefix of the tensors in a file; no module parameter begins with it.
PREFIX = ".probe."

PLACES = {"encoder": "the encoder's output", "head": "the head's output"}

#: Maximum number of values in a probe.
_MOST_VALUES = 1 << 20


class ProbeError(ValueError):
    """A runtime's answer differs from the plan's; a one-line message."""


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
    # by form of the weights (OWN, SEVEN_BITS), then by place ("encoder",
    # "head")
    answers: dict[str, dict[str, Answer]]

    def compare(
        self, compute: Compute, form: str, device: str | torch.device
    ) -> dict[str, Distance]:
        """Distance by place of a runtime's results, the encoder's output
        first."""
        answers = self.answers.get(form) or self.answers[OWN]
        hidden, labels = run_network(
            compute, float_waves(self.wave), self.lengths, torch.device(device)
        )
        return {
            place: answers[place].compare(found)
            for place, found in self.places(hidden, labels).items()
            if place in answers
        }

    def difference(
        self, compute: Compute, form: str, device: str | torch.device
    ) -> str | None:
        """Where a runtime's results differ, by how much, and what is
        allowed; None if they do not."""
        for place, distance in self.compare(compute, form, device).items():
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
        """The inverse of :meth:`tensors`; ValueError if these are not a
        probe."""
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
        """Raise ValueError if an index is out of range or a value not
        finite."""
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
    """Raise ValueError if tensors have more values than any probe has."""
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
    """Take out a tensor after checking its shape and dtype."""
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
