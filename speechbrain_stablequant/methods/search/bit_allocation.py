"""Mixed precision: bits for each unit under a budget of bytes, a knapsack.

Assumes that the harm of units adds up and that more bits never harm. Harm is
the divergence from the float model's outputs: of a single unit, word errors
are too few to tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# Resolution of the budget. Sizes are rounded up to whole steps, so that their
# sum never exceeds the budget.
_STEPS = 4096


@dataclass(frozen=True)
class Option:
    """One unit at one width, everything else float.

    ``bits`` of its weights, 16 for float; ``size`` of its layers in bytes;
    ``harm``: the divergence it causes.
    """

    bits: int
    size: int
    harm: float


def monotone(options: Sequence[Option]) -> list[Option]:
    """Options of one unit in ascending bits, where more bits never harm more.

    Measured harm is noisy: fewer bits may seem better.
    """
    found: list[Option] = []
    for option in reversed(options):
        least = found[-1].harm if found else option.harm
        found.append(replace(option, harm=max(option.harm, least)))
    return found[::-1]


def choose_bits(
    options: Mapping[str, Sequence[Option]], budget: int
) -> dict[str, int]:
    """The widths with the least total harm in a budget; ties go to more bits.

    ``options`` of each unit are monotone; ``budget``: bytes of all units
    together. Raises a ValueError if even the smallest options exceed it.
    """
    smallest = {u: min(row, key=lambda o: o.size) for u, row in options.items()}
    least = sum(option.size for option in smallest.values())
    if least > budget:
        raise ValueError(
            f"quantize.plus.budget.size: the fewest bits take {least} bytes, "
            f"the budget leaves {budget}; allow a larger size or fewer bits"
        )
    step = max(1, -(-budget // _STEPS))
    room = budget // step
    rows = {
        unit: [replace(o, size=-(-o.size // step)) for o in row]
        for unit, row in options.items()
    }
    if sum(min(o.size for o in row) for row in rows.values()) > room:
        # A budget so tight that rounding sizes up exceeds it.
        rows = {u: [replace(o, size=0)] for u, o in smallest.items()}
    # best[r]: least (harm, -bits) with at most r steps, and the choice.
    best: list[tuple[float, int] | None] = [(0.0, 0)] * (room + 1)
    choices: list[list[Option | None]] = []
    for row in rows.values():
        following: list[tuple[float, int] | None] = [None] * (room + 1)
        choice: list[Option | None] = [None] * (room + 1)
        for option in row:
            for r in range(option.size, room + 1):
                before = best[r - option.size]
                if before is None:
                    continue
                value = (before[0] + option.harm, before[1] - option.bits)
                if following[r] is None or value < following[r]:
                    following[r], choice[r] = value, option
        best = following
        choices.append(choice)
    found, r = {}, room
    for unit, choice in zip(reversed(rows), reversed(choices), strict=True):
        found[unit] = choice[r].bits
        r -= choice[r].size
    return {unit: found[unit] for unit in options}
