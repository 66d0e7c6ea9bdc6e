"""An answer to a probe, and how far another result may be from it.

Quantized networks are chaotic: a value at a tie that rounds the other way
changes everything after it. So the tolerance is measured: on inputs perturbed
in their last bits, and with everything between the products rounded to
bfloat16. The distance is taken over all values, over each channel and over
each frame, so that one wrong row of a weight and one wrong frame are seen too.
"""

import math
from dataclasses import dataclass, field

import torch

#: Times the largest measured distance. Correct runtimes stay below 0.9 of it,
#: also in 16 bits.
TOTAL_FACTOR = 1.5

#: Times the mean distance of a channel or row. Correct runtimes: below 1.9.
PART_FACTOR = 2.75

#: Share of the overall mean, added to the distance of a channel or row.
PART_SHARE = 0.3

#: Share of the answer's norm that is always allowed: it is stored in 16 bits.
FLOOR = 1e-3


@dataclass(frozen=True)
class Answer:
    """The values at one place of a network, and how far they move."""

    values: torch.Tensor = field(repr=False)  # float32 [rows, channels]
    distance: torch.Tensor  # float32 scalar: the largest measured
    # float32 [channels]: RMS of the distances
    channels: torch.Tensor = field(repr=False)
    # float32 [rows]: RMS of the distances
    rows: torch.Tensor = field(repr=False)

    @classmethod
    def measured(
        cls, values: torch.Tensor, groups: list[list[torch.Tensor]]
    ) -> "Answer":
        """The answer whose perturbed copies are given in groups, one group
        for each kind of perturbation; the strongest kind counts."""
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
        """Distance of another result [rows, channels] relative to what is
        allowed: of the whole if that fails, else of the worst part."""
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
        # Report the whole rather than a part of it.
        return next(
            (distance for distance in distances if distance.ratio > 1),
            max(distances, key=lambda distance: distance.ratio),
        )


@dataclass(frozen=True)
class Distance:
    """How far a result is from an answer."""

    ratio: float  # to what is allowed
    text: str  # in words, without the subject

    @classmethod
    def of(
        cls,
        off: torch.Tensor,
        allowed: torch.Tensor,
        size: torch.Tensor,
        where: str = "",
    ) -> "Distance":
        """Distance ``off`` where ``allowed`` is tolerated, as percentages of
        ``size``."""
        percent = [
            f"{100 * float(x) / max(float(size), 1e-30):.3g} %"
            for x in (off, allowed)
        ]
        text = f"is off by {percent[0]}{where}, {percent[1]} is allowed"
        ratio = float(off) / max(float(allowed), 1e-30)
        return cls(ratio, text)
