"""Very short utterances on which a quantized network is not chaotic.

In two frames, few values lie near a tie. Where none does, rounding of float32
changes nothing: a runtime answers as the simulation does, to six digits, while
one wrong scale or row moves every answer by a hundredth. Of many utterances,
those are kept that noise as large as a runtime's own left as they were. Other
runtimes round elsewhere, and may meet a tie in some, but not in all: the
closest answer counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

#: Number of utterances.
COUNT = 24

#: Share of an answer's norm that is allowed: it is stored in 16 bits. Correct
#: runtimes stay below 0.3 of it.
ALLOWED = 2e-3

#: Waves are stored in 8 bits, in so many steps of 16 bits.
STEP = 128

#: Maximum number of values of an answer, which are evenly spread.
_MOST = 128

_PLACES = ("encoder", "head")

#: From waves, int16 [utterances, samples], to the encoder's and the heads'
#: output, as ``run_network`` gives them.
Run = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def answers_of(run: Run, wave: torch.Tensor) -> dict[str, torch.Tensor]:
    """Float32 [utterances, values] by place."""
    hidden, labels = run(wave.short() * STEP)
    found = {"encoder": hidden}
    if labels is not None:
        # Log probabilities and their logits are the same here.
        found["head"] = labels - labels.mean(-1, keepdim=True)
    spread = {place: -(-x[0].numel() // _MOST) for place, x in found.items()}
    return {
        place: x.flatten(1)[:, :: spread[place]] for place, x in found.items()
    }


def distances(found: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Relative distance of each utterance's answer; infinite if it is not a
    number or of another shape."""
    if found.shape != values.shape:
        return torch.full((len(values),), torch.inf)
    size = values.norm(dim=1).clamp_min(1e-30)
    return ((found - values).norm(dim=1) / size).nan_to_num(torch.inf)


@dataclass(frozen=True)
class Snippets:
    """The utterances and their answers."""

    wave: torch.Tensor = field(repr=False)  # int8 [utterances, samples]
    answers: dict[str, torch.Tensor] = field(repr=False)

    def compare(self, run: Run) -> dict[str, float]:
        """Distance by place of a runtime's closest answer."""
        found = answers_of(run, self.wave)
        return {
            place: float(distances(found[place], values).min())
            for place, values in self.answers.items()
            if place in found
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        halves = {
            place: x.half() if x.half().isfinite().all() else x
            for place, x in self.answers.items()
        }
        return {"wave": self.wave, **halves}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Snippets":
        """The inverse of :meth:`tensors`; ValueError if these are others."""
        wave, *values = (tensors.get(x) for x in ("wave", *_PLACES))
        answers = {
            place: x.float()
            for place, x in zip(_PLACES, values, strict=True)
            if x is not None
        }
        good = (
            wave is not None
            and wave.dtype == torch.int8
            and "encoder" in answers
            and tensors.keys() <= {"wave", *_PLACES}
            and all(
                x.dim() == 2
                and len(x) == len(wave)
                and x.numel()
                and bool(x.isfinite().all())
                for x in (wave, *answers.values())
            )
        )
        if not good:
            raise ValueError("the probe's short utterances are not consistent")
        return cls(wave, answers)
