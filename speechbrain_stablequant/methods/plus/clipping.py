"""The clipping percentile of each layer."""

from collections.abc import Iterable
from functools import partial

from ...core.layer_quant import LayerQuant
from ...core.plan import UnitPlan
from ...model.layers import Layer
from ..search import Evaluate
from ..stablequant import search_units
from .scales import layer_quant
from .work import FloatModel, Work


def clipping_percentiles(
    work: Work, model: FloatModel
) -> tuple[list[UnitPlan], dict[str, float]]:
    """Units, and the clipping percentile by layer, as ``plus.cutoffs`` says."""
    session = work.session
    cutoffs = session.config.plus.cutoffs
    if cutoffs == "units":
        _, units = search_units(
            session,
            *work.evaluator(model),
            partial(layer_quant, work, model, least_error=False),
        )
        by_unit = {unit.name: unit.cutoff for unit in units}
        return units, {x.name: by_unit[x.unit] for x in session.layers}
    units = [UnitPlan(name) for name in session.units]
    return units, _by_layer(work, model) if cutoffs == "layers" else {}


def _by_layer(work: Work, model: FloatModel) -> dict[str, float]:
    """By the divergence that each layer causes, everything else float."""
    evaluate, bar = work.evaluator(model, "divergence")
    grid = sorted(work.session.config.search.cutoffs, reverse=True)
    layers = [layer for unit in work.units.values() for layer in unit]
    curves, found = {}, {}
    with bar:
        # Most layers need the first percentile and a worse one only.
        bar.total = 2 * len(layers)
        for layer in layers:
            quants = ((x, layer_quant(work, model, layer, x)) for x in grid)
            curve = curves[layer.name] = _curve(layer, quants, evaluate)
            # Ties go to the larger percentile.
            found[layer.name], _ = min(curve, key=lambda row: (row[1], -row[0]))
    work.parts.append({"part": "cutoffs", "layers": curves})
    return found


def _curve(
    layer: Layer,
    quants: Iterable[tuple[float, LayerQuant]],
    evaluate: Evaluate,
) -> list[list[float]]:
    """Percentiles with their divergences, until one is worse than the best.

    Clipping more only gets worse from there. Equal quants are tried once.
    """
    curve: list[list[float]] = []
    last: LayerQuant | None = None
    for percentile, quant in quants:
        if quant == last:
            continue
        last = quant
        score = evaluate(
            {layer.name: quant},
            start=layer.unit,
            label=f"{layer.name} cut at {percentile:g} %",
        )
        curve.append([percentile, score.loss])
        if score.loss > min(loss for _, loss in curve):
            break
    return curve
