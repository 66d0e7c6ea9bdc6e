"""The clipping percentile of each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from ...core.layer_quant import LayerQuant
from ...core.plan import UnitPlan
from ...model.layers import Layer
from ...utils.files import identity
from ..search.score import Evaluate, finite
from ..stablequant import layer_cutoffs, search_units
from .work import InputHarm, Work

# Of weights, while inputs are compared: their own error would hide the
# inputs', and is repaired later.
_WEIGHT_BITS = 8


def choose_percentiles(work: Work) -> tuple[list[UnitPlan], list[InputHarm]]:
    """Decides the percentiles as ``plus.cutoffs`` says; returns the units,
    and what the inputs of layers cause where that was measured."""
    session = work.session
    cutoffs = session.config.plus.cutoffs
    units, harms = [UnitPlan(name) for name in session.units], []
    if cutoffs == "layers":
        harms = _by_layer(work)
    elif cutoffs == "units":
        _, units = search_units(
            work.search_set,
            work.evaluator(),
            work.evaluator("divergence") if session.by_divergence else None,
            partial(work.quant, least_error=False),
        )
        work.percentiles = layer_cutoffs(session, units)
    return units, harms


def _by_layer(work: Work) -> list[InputHarm]:
    """By the divergence that each layer causes, everything else float."""
    evaluate, groups = work.evaluator("divergence"), _groups(work)
    curves, harms = {}, []
    steps = "layers"  # Each takes a different number of evaluations.
    what = f"clipping percentiles of {steps}"
    with work.search_set.bar(what, len(groups), steps) as bar:
        for layers in groups:
            curve = _curve(work, layers, evaluate)
            # Ties go to the larger percentile.
            best, least = min(curve, key=lambda row: (row[1], -row[0]))
            harms.append(InputHarm(layers, least))
            for layer in layers:
                curves[layer.name] = [[at, finite(loss)] for at, loss in curve]
                work.percentiles[layer.name] = best
            bar.update(1)
    work.measured.append({"part": "cutoffs", "layers": curves})
    return harms


def _groups(work: Work) -> list[list[Layer]]:
    """Layers that are clipped together: where passes are expensive, q, k, v."""
    histograms = work.calibration.histograms
    groups: list[list[Layer]] = []
    alone = work.session.weights_alone
    for layers in work.units.values():
        alike: dict[str, list[Layer]] = {}
        for layer in layers:
            if layer.name in alone:
                continue
            key = layer.name
            if work.session.by_divergence:
                key = identity(histograms[layer.name].to_dict())
            alike.setdefault(key, []).append(layer)
        groups += alike.values()
    return groups


def confirm_percentiles(work: Work) -> None:
    """Drops the clipping of layers if the words of the search set
    contradict."""
    session = work.session
    if session.config.plus.cutoffs != "layers" or not session.by_divergence:
        return
    clipped, percentiles = work.quants(), work.percentiles
    work.percentiles = dict.fromkeys(percentiles, 100.0)
    if work.quants() == clipped:
        return
    evaluate = work.evaluator()
    with work.search_set.bar("confirmation by words", 3):
        evaluate({}, label="float")
        whole = evaluate(_compared(work.quants()), label="without clipping")
        found = evaluate(_compared(clipped), label="clipped")
    confirmed = found.errors <= whole.errors
    if confirmed:
        work.percentiles = percentiles
    row = {"wer": found.wer, "wer_without_clipping": whole.wer}
    work.measured.append(
        {"part": "confirmation", **row, "confirmed": confirmed}
    )


def _compared(quants: Mapping[str, LayerQuant]) -> dict[str, LayerQuant]:
    """Quants with weights as inputs are compared."""
    return {
        name: replace(quant, weight_bits=_WEIGHT_BITS)
        for name, quant in quants.items()
    }


def _curve(
    work: Work, layers: Sequence[Layer], evaluate: Evaluate
) -> list[list[float]]:
    """Percentiles with their divergences, until one is worse than the best."""
    curve: list[list[float]] = []
    last: LayerQuant | None = None
    for percentile in sorted(work.session.config.search.cutoffs, reverse=True):
        quant = work.quant(layers[0], percentile)
        if quant == last:
            continue
        last = quant
        score = evaluate(
            _compared({layer.name: quant for layer in layers}),
            start=layers[0].unit,
            label=f"{layers[0].name} cut at {percentile:g} %",
        )
        curve.append([percentile, score.loss])
        if score.loss > min(loss for _, loss in curve):
            break
    return curve
