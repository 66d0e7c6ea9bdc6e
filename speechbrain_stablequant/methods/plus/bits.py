"""Mixed precision: bits for each unit under a budget of bytes."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import product

import torch
from torch import nn

from ...core.affine import FLOAT_BITS
from ...core.packing import packed_size
from ...core.plan_tensors import parameters_by_name
from ...model.layers import Layer
from ...model.rotation import rotation_of
from ..search.bit_allocation import Option, choose_bits, monotone
from ..search.score import finite
from .work import Work

Harm = Callable[[Work, list[int]], dict[tuple[str, int], float]]

# Of a layer in the file: its description and the names of its tensors.
_HEADER_BYTES = 700


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
    reason = "stays float: its unit suffers more than its size is worth"
    for layer in work.session.layers:
        if work.bits[layer.unit] == FLOAT_BITS:
            work.float_layers.setdefault(layer.name, reason)
    units = {}
    for unit, row in options.items():
        pairs = zip(row, counted[unit], strict=True)
        rows = [
            {
                **asdict(x),
                "harm": finite(x.harm),
                "counted": finite(other.harm),
            }
            for x, other in pairs
        ]
        units[unit] = {"bits": work.bits[unit], "options": rows}
    part = {"part": "budget", "scores": budget.scores, "size": budget.size}
    work.measured.append({**part, "bytes": room, "units": units})


def _measured_harm(
    work: Work, widths: list[int]
) -> dict[tuple[str, int], float]:
    """The divergence of each unit quantized alone, by unit and bits."""
    evaluate, at = work.evaluator("divergence"), work.percentiles
    found = dict.fromkeys(product(work.units, widths), 0.0)
    measured = [
        (unit, bits)
        for unit, bits in found
        if bits != FLOAT_BITS and work.units[unit]
    ]
    with work.search_set.bar("bits of each unit", len(measured)):
        for unit, bits in measured:
            quants = {
                x.name: work.quant(x, at[x.name], bits)
                for x in work.units[unit]
            }
            label = f"{unit} at {bits} bits"
            found[unit, bits] = evaluate(quants, start=unit, label=label).loss
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
            size += _integer_bytes(layer.module.weight, bits)
    return size


def _integer_bytes(weight: torch.Tensor, bits: int) -> int:
    return packed_size(weight.numel(), bits) + 4 * len(weight) + _HEADER_BYTES


def _float_bytes(work: Work) -> int:
    return 2 if work.session.config.float_dtype == "float16" else 4


def _room(work: Work, fraction: float) -> int:
    """Bytes that a budget leaves for the weights of the layers; the rest is
    stored in float, or in integers of 8 bits."""
    session = work.session
    modules = session.recognizer.modules
    target = nn.ModuleList(modules[key] for key in session.config.target)
    every = sum(parameter.numel() for parameter in target.parameters())
    rest = every - sum(layer.numel for layer in session.layers)
    # Stored beside the float model's parameters.
    rest += sum(
        rotation_of(encoder.model.encoder).numel() for encoder in work.rotated
    )
    # A tied embedding is counted as a layer.
    state, layers = parameters_by_name(modules), session.layers
    taken = {id(p) for layer in layers for p in layer.module.parameters()}
    only = [state[name] for name in session.weight_only]
    only = [weight for weight in only if id(weight) not in taken]
    rest -= sum(weight.numel() for weight in only)
    integers = sum(_integer_bytes(weight, 8) for weight in only)
    return int(4 * every * fraction) - rest * _float_bytes(work) - integers
