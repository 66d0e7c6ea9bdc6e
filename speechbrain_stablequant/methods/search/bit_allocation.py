"""Mixed precision: bits for each unit under a budget of bytes.

Pure: it takes what was measured of each unit alone at each width, and
returns the widths. Two assumptions make that a knapsack: the harm of units
adds up, and a unit is not harmed by more bits. The harm is the divergence of
the outputs from those of the float model: word errors are what counts, but of
one unit alone they are few, and noise would choose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# Steps of the budget: sizes are rounded up to them, so that the sum of what
# is chosen never is above the budget.
_STEPS = 4096


@dataclass(frozen=True)
class Option:
    """One unit at one width, everything else float.

    Arguments
    ---------
    bits : int
        Of its weights; 16 for a unit that stays float.
    size : int
        Bytes of its layers on disk.
    harm : float
        Divergence that it alone causes.
    """

    bits: int
    size: int
    harm: float


def harms(options: Mapping[str, Sequence[Option]]) -> dict[str, list[float]]:
    """Harm of each option, as the module says.

    Arguments
    ---------
    options : Mapping
        For each unit, its options by rising bits.

    Returns
    -------
    dict
        Harm of each option, not below that of the options with more bits.

    Example
    -------
    >>> harms({"u": [Option(4, 1, 0.2), Option(6, 2, 0.3), Option(8, 3, 0.1)]})
    {'u': [0.3, 0.3, 0.1]}
    """
    found = {}
    for unit, row in options.items():
        values = [option.harm for option in row]
        # Noise may make fewer bits look better: they never are.
        for i in range(len(values) - 2, -1, -1):
            values[i] = max(values[i], values[i + 1])
        found[unit] = values
    return found


def choose_bits(
    options: Mapping[str, Sequence[Option]], budget: int
) -> dict[str, int]:
    """The widths with the least harm in a budget; ties go to more bits.

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
        The smallest options together are above the budget.

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
    """Sizes in steps. A budget that only just holds the smallest options is
    lost by rounding up: then those are all there is."""
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
