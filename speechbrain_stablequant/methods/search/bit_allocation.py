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


def harms(options: Mapping[str, Sequence[Option]]) -> dict[str, list[float]]:
    """Harm of each option, made monotone: more bits never harm more."""
    found = {}
    for unit, row in options.items():
        values = [option.harm for option in row]
        # Measured harm is noisy: fewer bits may seem better.
        for i in range(len(values) - 2, -1, -1):
            values[i] = max(values[i], values[i + 1])
        found[unit] = values
    return found


def choose_bits(
    options: Mapping[str, Sequence[Option]], budget: int
) -> dict[str, int]:
    """The widths with the least total harm in a budget; ties go to more bits.

    Arguments
    ---------
    options : Mapping
        For each unit, its options, at least one.
    budget : int
        Bytes for all units together.

    Returns
    -------
    dict
        Bits by unit.

    Raises
    ------
    ValueError
        Even the smallest options exceed the budget.

    Example
    -------
    >>> options = {
    ...     "a": [Option(4, 50, 0.9), Option(8, 100, 0.0)],
    ...     "b": [Option(4, 50, 0.1), Option(8, 100, 0.0)]}
    >>> choose_bits(options, 150)
    {'a': 8, 'b': 4}
    """
    rows = {
        unit: sorted(row, key=lambda o: (o.bits, o.size))
        for unit, row in options.items()
    }
    least = sum(min(o.size for o in row) for row in rows.values())
    if least > budget:
        raise ValueError(
            f"quantize.plus.budget.size: the fewest bits take {least} bytes, "
            f"the budget leaves {budget}; allow a larger size or fewer bits"
        )
    costs = harms(rows)
    step = max(1, -(-budget // _STEPS))
    room = budget // step
    rows, costs = _rounded_up(rows, costs, step, room)
    # best[r]: least (harm, -bits) with at most r steps, and the choice.
    best: list[tuple[float, int] | None] = [(0.0, 0)] * (room + 1)
    choices: list[list[int]] = []
    for unit, row in rows.items():
        following: list[tuple[float, int] | None] = [None] * (room + 1)
        choice = [-1] * (room + 1)
        for index, option in enumerate(row):
            harm = costs[unit][index]
            for r in range(option.size, room + 1):
                before = best[r - option.size]
                if before is None:
                    continue
                value = (before[0] + harm, before[1] - option.bits)
                if following[r] is None or value < following[r]:
                    following[r], choice[r] = value, index
        best = following
        choices.append(choice)
    found, r = {}, room
    for unit, choice in reversed(list(zip(rows, choices, strict=True))):
        option = rows[unit][choice[r]]
        found[unit] = option.bits
        r -= option.size
    return {unit: found[unit] for unit in options}


def _rounded_up(
    rows: dict[str, list[Option]],
    costs: dict[str, list[float]],
    step: int,
    room: int,
) -> tuple[dict[str, list[Option]], dict[str, list[float]]]:
    """Sizes in steps of the budget, rounded up.

    If that makes a tight budget infeasible, only the smallest options are left,
    at size 0.
    """
    coarse = {
        unit: [replace(o, size=-(-o.size // step)) for o in row]
        for unit, row in rows.items()
    }
    if sum(min(o.size for o in row) for row in coarse.values()) <= room:
        return coarse, costs
    kept = {
        unit: min(range(len(row)), key=lambda i, row=row: row[i].size)
        for unit, row in rows.items()
    }
    smallest = {u: [replace(rows[u][i], size=0)] for u, i in kept.items()}
    return smallest, {unit: [costs[unit][i]] for unit, i in kept.items()}
