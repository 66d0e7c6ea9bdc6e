"""The clipping percentile of each layer."""

from collections.abc import Iterable
from functools import partial

from ...core.layer_quant import LayerQuant
from ...core.plan import UnitPlan
from ...model.layers import Layer
from ..search.score import Evaluate
from ..stablequant import layer_cutoffs, search_units
from .work import Work


def choose_percentiles(work: Work) -> list[UnitPlan]:
    """Decides the percentiles as ``plus.cutoffs`` says; returns the units."""
    session = work.session
    cutoffs = session.config.plus.cutoffs
    units = [UnitPlan(name) for name in session.units]
    if cutoffs == "layers":
        _by_layer(work)
    elif cutoffs == "units":
        _, units = search_units(
            session,
            *work.evaluator(),
            partial(work.quant, least_error=False),
        )
        work.percentiles = layer_cutoffs(session, units)
    return units


def _by_layer(work: Work) -> None:
    """By the divergence that each layer causes, everything else float."""
    evaluate, bar = work.evaluator("divergence")
    grid = sorted(work.session.config.search.cutoffs, reverse=True)
    layers = [layer for unit in work.units.values() for layer in unit]
    curves = {}
    with bar:
        # Most layers need the first percentile and a worse one only.
        bar.total = 2 * len(layers)
        for layer in layers:
            quants = ((x, work.quant(layer, x)) for x in grid)
            curve = curves[layer.name] = _curve(layer, quants, evaluate)
            # Ties go to the larger percentile.
            best, _ = min(curve, key=lambda row: (row[1], -row[0]))
            work.percentiles[layer.name] = best
    work.parts.append({"part": "cutoffs", "layers": curves})


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
