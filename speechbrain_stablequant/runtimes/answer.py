"""The values at one place of a network, and how far another result is."""

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import torch

#: Times the largest measured distance. Correct runtimes stay below 0.9 of it,
#: also in 16 bits.
TOTAL_FACTOR = 1.5

#: Times the mean distance of a channel or row. Correct runtimes: below 1.9.
PART_FACTOR = 2.75

#: Share of the overall mean, added to the distance of a channel or row.
PART_SHARE = 0.3

#: Times the largest mean distance of any row: what one row may move. A Whisper
#: with bfloat16 between its products: 0.99.
JUMP_FACTOR = 1.25

#: Share of the answer's norm that is always allowed: it is stored in 16 bits.
FLOOR = 1e-3


class Distance(NamedTuple):
    """How far a result is from an answer."""

    ratio: float  # to what is allowed
    text: str  # in words, without the subject


by_ratio = attrgetter("ratio")


@dataclass(frozen=True)
class Answer:
    """The values at one place of a network, and how far they move."""

    values: torch.Tensor = field(repr=False)  # float32 [rows, channels]
    distance: torch.Tensor  # float32 scalar: the largest measured
    # float32 [channels] and [rows]: RMS of the distances
    channels: torch.Tensor = field(repr=False)
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

    def compare(self, found: torch.Tensor) -> Distance:
        """Distance of another result [rows, channels], relative to the allowed
        one: of the whole if it is too large, else of the worst row or
        channel."""
        shape = list(self.values.shape)
        if list(found.shape) != shape:
            return Distance(
                math.inf, f"has shape {list(found.shape)} instead of {shape}"
            )
        if not found.isfinite().all():
            return Distance(math.inf, "is not finite")
        error, size = found - self.values, self.values.norm()
        allowed = TOTAL_FACTOR * self.distance + FLOOR * size
        distances = [_distance(error.norm(), allowed, size)]
        for axis, (what, usual) in enumerate(
            (("channel", self.channels), ("row", self.rows))
        ):
            sizes = self.values.square().sum(axis).sqrt()
            off = error.square().sum(axis).sqrt()
            allowed = PART_FACTOR * (usual + PART_SHARE * usual.mean())
            allowed = allowed + FLOOR * sizes.square().mean().sqrt()
            i = _worst(off, allowed)
            if what == "row":
                # A value that rounds the other way moves one row by much, and
                # which one differs between runtimes.
                most = JUMP_FACTOR * usual.max()
                allowed[i] = allowed[i].maximum(most)
                i = _worst(off, allowed)
            where = f" in {what} {i}"
            distances.append(_distance(off[i], allowed[i], sizes[i], where))
        # Report the whole rather than a part of it.
        return next(
            (distance for distance in distances if distance.ratio > 1),
            max(distances, key=by_ratio),
        )


def _worst(off: torch.Tensor, allowed: torch.Tensor) -> int:
    return int((off / allowed).nan_to_num(0.0).argmax())


def _distance(
    off: torch.Tensor,
    allowed: torch.Tensor,
    size: torch.Tensor,
    where: str = "",
) -> Distance:
    """Distance ``off`` where ``allowed`` is tolerated, as percentages of
    ``size``."""
    percent, limit = (
        f"{100 * float(x) / max(float(size), 1e-30):.3g} %"
        for x in (off, allowed)
    )
    ratio = float(off) / max(float(allowed), 1e-30)
    return Distance(ratio, f"is off by {percent}{where}, {limit} is allowed")
