"""Mixed precision: bits for each unit under a budget of bytes."""

from collections.abc import Mapping
from dataclasses import asdict

from ...core.packing import packed_size
from ...model.layers import Layer
from ...model.rotation import rotation_of
from ..search import Evaluate
from ..search.bit_allocation import Option, choose_bits, harms
from ..session import search_evaluate
from .modelopt_scores import modelopt_scores
from .scales import FLOAT_BITS, least_error_quant
from .work import FloatModel, Work

# Of a layer in the file: its description and the names of its tensors.
_HEADER_BYTES = 700


def choose_unit_bits(
    work: Work, model: FloatModel, percentiles: Mapping[str, float]
) -> dict[str, int]:
    """Bits by unit under ``plus.budget``; empty without a budget."""
    budget = work.session.config.plus.budget
    if budget.size is None:
        return {}
    if budget.scores == "modelopt":
        options = _modelopt_options(work, model)
    else:
        options = _measured_options(work, model, percentiles)
    room = _room(work, budget.size)
    chosen = choose_bits(options, room)
    found = harms(options)
    work.parts.append(
        {
            "part": "budget",
            "scores": budget.scores,
            "size": budget.size,
            "bytes": room,
            "units": {
                unit: {
                    "bits": chosen[unit],
                    "options": [
                        {**asdict(option), "counted": harm}
                        for option, harm in zip(
                            options[unit], found[unit], strict=True
                        )
                    ],
                }
                for unit in options
            },
        }
    )
    return chosen


def _measured_options(
    work: Work, model: FloatModel, percentiles: Mapping[str, float]
) -> dict[str, list[Option]]:
    """Options by the divergence of each unit quantized alone."""
    session = work.session
    evaluate, journal, bar = search_evaluate(
        session, model.weights, model.calibration, "divergence"
    )
    widths = sorted(set(session.config.plus.budget.bits))
    options = {}
    with bar:
        bar.total = len(session.units) * len(widths)
        for unit, layers in session.units.items():
            options[unit] = [
                _measured_option(
                    work, model, unit, layers, percentiles, bits, evaluate
                )
                for bits in widths
            ]
    work.evaluations += journal.measured + journal.reused
    return options


def _measured_option(
    work: Work,
    model: FloatModel,
    unit: str,
    layers: list[Layer],
    percentiles: Mapping[str, float],
    bits: int,
    evaluate: Evaluate,
) -> Option:
    size = _size(work, layers, bits)
    layers = [x for x in layers if x.name not in work.float_layers]
    if bits == FLOAT_BITS or not layers:
        return Option(bits, size, 0.0)
    quants = {
        x.name: least_error_quant(
            work, x, model, percentiles.get(x.name, 100.0), bits
        )
        for x in layers
    }
    score = evaluate(quants, start=unit, label=f"{unit} at {bits} bits")
    return Option(bits, size, score.loss)


def _modelopt_options(work: Work, model: FloatModel) -> dict[str, list[Option]]:
    """Options by the scores of modelopt's AutoQuantize."""
    session = work.session
    widths = sorted(set(session.config.plus.budget.bits))
    layers = [x for x in session.layers if x.name not in work.float_layers]
    integer = [bits for bits in widths if bits != FLOAT_BITS]
    scores = {}
    if integer:
        scores = modelopt_scores(session, model.weights, layers, integer)
    return {
        unit: [
            Option(
                bits,
                _size(work, members, bits),
                sum(scores.get(x.name, {}).get(bits, 0.0) for x in members),
            )
            for bits in widths
        ]
        for unit, members in session.units.items()
    }


def _size(work: Work, layers: list[Layer], bits: int) -> int:
    """Bytes of layers on disk, without biases."""
    size = 0
    for layer in layers:
        if bits == FLOAT_BITS or layer.name in work.float_layers:
            size += layer.numel * _float_bytes(work)
            continue
        scales = layer.module.weight.shape[0]
        size += packed_size(layer.numel, bits) + 4 * scales + _HEADER_BYTES
    return size


def _float_bytes(work: Work) -> int:
    return 2 if work.session.config.float_dtype == "float16" else 4


def _room(work: Work, fraction: float) -> int:
    """Bytes that a budget leaves for the weights of the layers."""
    session = work.session
    modules = session.recognizer.modules
    counts: dict[int, int] = {}
    for key in session.config.target:
        for parameter in modules[key].parameters():
            counts[id(parameter)] = parameter.numel()
    every = sum(counts.values())
    rest = every - sum(layer.numel for layer in session.layers)
    # Stored beside the float model's parameters.
    rest += sum(
        rotation_of(encoder.model.encoder).numel() for encoder in work.rotated
    )
    return int(4 * every * fraction) - rest * _float_bytes(work)
