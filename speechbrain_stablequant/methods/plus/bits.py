"""Bits for each unit under a budget of bytes, a knapsack.

Assumes that harm adds up over units, and that more bits never harm more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from ...core.affine import FLOAT_BITS
from ...core.packing import packed_size
from ...model.layers import Layer
from ...model.rotation import rotation_of
from .work import Work

Harm = Callable[[Work, list[int]], dict[tuple[str, int], float]]

# Of a layer in the file: its description and the names of its tensors.
_HEADER_BYTES = 700
# Resolution of the budget. Sizes are rounded up to whole steps, so that their
# sum never exceeds the budget.
_STEPS = 4096


def choose_unit_bits(work: Work) -> None:
    """Decides the bits by unit under ``plus.budget``, if there is one."""
    budget = work.session.config.plus.budget
    if budget.size is None:
        return
    widths = sorted(set(budget.bits))
    harm = HARMS[budget.scores](work, widths)
    options = {
        unit: [
            Option(bits, _size(work, layers, bits), harm[unit, bits])
            for bits in widths
        ]
        for unit, layers in work.session.units.items()
    }
    counted = {unit: monotone(row) for unit, row in options.items()}
    room = _room(work, budget.size)
    work.bits = choose_bits(counted, room)
    units = {}
    for unit, row in options.items():
        pairs = zip(row, counted[unit], strict=True)
        rows = [{**asdict(x), "counted": other.harm} for x, other in pairs]
        units[unit] = {"bits": work.bits[unit], "options": rows}
    part = {"part": "budget", "scores": budget.scores, "size": budget.size}
    work.parts.append({**part, "bytes": room, "units": units})


def _measured_harm(
    work: Work, widths: list[int]
) -> dict[tuple[str, int], float]:
    """The divergence of each unit quantized alone, by unit and bits."""
    evaluate, bar = work.evaluator("divergence")
    found = {}
    with bar:
        bar.total = len(work.units) * len(widths)
        for unit, layers in work.units.items():
            for bits in widths:
                found[unit, bits] = 0.0
                if bits == FLOAT_BITS or not layers:
                    continue
                at = work.percentiles
                quants = {
                    x.name: work.quant(x, at[x.name], bits) for x in layers
                }
                label = f"{unit} at {bits} bits"
                score = evaluate(quants, start=unit, label=label)
                found[unit, bits] = score.loss
    return found


#: Estimates of the harm by unit and bits, by the name in
#: ``plus.budget.scores``; a script may add its own.
HARMS: dict[str, Harm] = {"divergence": _measured_harm}


def _size(work: Work, layers: list[Layer], bits: int) -> int:
    size = 0
    for layer in layers:
        if bits == FLOAT_BITS or layer.name in work.float_layers:
            size += layer.numel * _float_bytes(work)
        else:
            scales = layer.module.weight.shape[0]
            size += packed_size(layer.numel, bits) + 4 * scales + _HEADER_BYTES
    return size


def _float_bytes(work: Work) -> int:
    return 2 if work.session.config.float_dtype == "float16" else 4


def _room(work: Work, fraction: float) -> int:
    """Bytes that a budget leaves for the weights of the layers."""
    session = work.session
    modules = session.recognizer.modules
    target = nn.ModuleList(modules[key] for key in session.config.target)
    every = sum(parameter.numel() for parameter in target.parameters())
    rest = every - sum(layer.numel for layer in session.layers)
    # Stored beside the float model's parameters.
    rest += sum(
        rotation_of(encoder.model.encoder).numel() for encoder in work.rotated
    )
    return int(4 * every * fraction) - rest * _float_bytes(work)


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
    """Ascending bits that never harm more, though measured harm is noisy."""
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

    Example
    -------
    >>> options = {
    ...     "a": [Option(4, 50, 0.9), Option(8, 100, 0.0)],
    ...     "b": [Option(4, 50, 0.1), Option(8, 100, 0.0)]}
    >>> choose_bits(options, 150)
    {'a': 8, 'b': 4}
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
