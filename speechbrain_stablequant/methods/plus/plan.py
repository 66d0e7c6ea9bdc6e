"""StableQuant-plus: a pipeline of parts, each with its own switch.

In order: rotation of the residual stream, equalization, clipping percentiles
by layer or unit, bits under a budget, scales of least squared error, rounding
with error compensation, bias correction.

StableQuant decides by word errors. Here each part changes little, and word
errors are too few to tell: the divergence from the float model's outputs
decides (see :mod:`..search.divergence`).
"""

from collections.abc import Container, Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from ...core.histogram import Histogram
from ...core.layer_quant import LayerQuant, LayerTensors
from ...core.plan import LayerPlan, QuantizationPlan
from ...core.plan_tensors import AdjustedTensors
from ...model.layers import Layer
from ..layerwise import AdaRound, Compensate, rounded_layers
from ..session import Calibration, Session, keep_float_outputs
from .bits import choose_unit_bits
from .clipping import clipping_percentiles
from .quarot import is_rotated, rotated, rotated_floats
from .scales import layer_quants
from .smoothquant import (
    Site,
    changed_floats,
    channel_maxima,
    equalized,
    factors,
    find_sites,
)
from .work import FloatModel, Work


def plus_plan(
    session: Session, weights: str, calibration: Calibration
) -> tuple[QuantizationPlan, dict[str, Histogram]]:
    """The plan, and histograms of the rotated and equalized model.

    ``calibration``: of the float model, before rotation and equalization.
    ``search["parts"]`` of the plan has the divergence after each part.
    """
    work = Work(session, weights, calibration)
    keep_float_outputs(session)
    with ExitStack() as stack:
        stack.callback(work.reset_simulator)
        stack.enter_context(rotated(work.rotated, session.config.seed))
        strength, by_site = _best_equalization(work)
        stack.enter_context(equalized(by_site))
        model = work.model_now(strength)
        units, percentiles = clipping_percentiles(work, model)
        bits = choose_unit_bits(work, model, percentiles)
        quants = layer_quants(work, model, percentiles, bits)
        work.divergence(model, quants, "scales")
        selected = {unit.name for unit in units if unit.selected}
        tensors = _rounded(work, model, quants, selected, bool(by_site))
        floats = changed_floats(by_site, quants)
        # A parameter that both changed has its present value in both.
        floats |= rotated_floats(work.rotated, quants)
        record = _record(work, model, quants, tensors)
        layers = [
            _layer_plan(work, layer, model, percentiles, quants)
            for layer in session.layers
        ]
    plan = session.assemble(weights, units, layers, record)
    adjusted = AdjustedTensors(tensors, floats)
    return replace(plan, tensors=adjusted or None), model.histograms


def _best_equalization(work: Work) -> tuple[float, dict[Site, torch.Tensor]]:
    """The strength with the least divergence, and its factors; 0 for none."""
    session, plus = work.session, work.session.config.plus
    sites = [
        site
        for site in find_sites(session.encoders, session.layers)
        if plus.equalize and not is_rotated(site.producer, work.rotated)
    ]
    if not sites:
        return 0.0, {}
    maxima = channel_maxima(
        sites, lambda: session.recognizer.forward("calibration", lambda _: None)
    )
    found = []
    for strength in sorted({0.0, *plus.strengths}):
        by_site = {
            site: factors(site, maxima[site], strength)
            for site in sites
            if strength
        }
        with equalized(by_site):
            model = work.model_now(strength)
            quants = layer_quants(work, model, {}, {})
            harm = work.divergence(model, quants, "equalize", strength=strength)
        found.append((harm, strength, by_site))
    _, best, by_site = min(found, key=lambda row: row[:2])
    return best, by_site


def _rounded(
    work: Work,
    model: FloatModel,
    quants: Mapping[str, LayerQuant],
    selected: Container[str],
    equalized: bool,
) -> dict[str, LayerTensors]:
    """Integers and biases, each layer after the ones before it.

    ``selected``: units that AdaRound rounds. Empty if a runtime finds the same
    integers in the float model.
    """
    session, plus = work.session, work.session.config.plus
    rounds = plus.compensate or plus.adaround
    if not (equalized or work.rotated or rounds or plus.bias_correction):
        return {}
    learned = session.config.adaround.solver()
    compensated = Compensate(plus.damping, plus.earlier_errors)
    without_effect = _convs_before_group_norm(session)

    def solve(layer: Layer) -> AdaRound | Compensate | None:
        if plus.adaround and layer.unit in selected:
            return learned
        return compensated if plus.compensate else None

    tensors = rounded_layers(
        session,
        model.weights,
        model.calibration.in_order,
        quants,
        "plus",
        solve,
        lambda x: plus.bias_correction and x.name not in without_effect,
    )
    if plus.bias_correction:
        without = {name: replace(t, bias=None) for name, t in tensors.items()}
        plain = work.divergence(model, quants, "rounding", without)
        harm = work.divergence(model, quants, "rounding and biases", tensors)
        return tensors if harm < plain else without
    if rounds:
        work.divergence(model, quants, "rounding", tensors)
    return tensors


def _convs_before_group_norm(session: Session) -> set[str]:
    """Convolutions whose bias a per-channel normalization removes."""
    modules = {
        id(part.conv)
        for encoder in session.encoders
        for part in encoder.model.feature_extractor.conv_layers
        if isinstance(getattr(part, "layer_norm", None), nn.GroupNorm)
    }
    return {x.name for x in session.layers if id(x.module) in modules}


def _record(
    work: Work,
    model: FloatModel,
    quants: Mapping[str, LayerQuant],
    tensors: Mapping[str, LayerTensors],
) -> dict:
    """What the plan says of the search."""
    baseline, final = work.word_errors(model, quants, tensors)
    session, search = work.session, work.session.config.search
    return {
        "num_utterances": len(session.recognizer.ids("search")),
        "metric": search.metric,
        "selection": search.selection,
        "level": search.level,
        "threshold": search.threshold,
        "evaluations": work.evaluations,
        "baseline_wer": baseline.wer,
        "final_wer": final.wer,
        "parts": work.parts,
        "runtimes": list(session.runtimes),
    }


def _layer_plan(
    work: Work,
    layer: Layer,
    model: FloatModel,
    percentiles: Mapping[str, float],
    quants: Mapping[str, LayerQuant],
) -> LayerPlan:
    percentile = percentiles.get(layer.name, 100.0)
    quant = quants.get(layer.name)
    if layer.name in work.float_layers:
        reason = "stays float: it takes in the audio itself"
    elif quant is None:
        reason = "stays float: its unit suffers more than its size is worth"
    else:
        reason = f"cut at {percentile:g} %, then smallest squared error"
        if quant.activation_offset:
            reason += "; offset for an input behind a GELU"
    return LayerPlan(
        name=layer.name,
        unit=layer.unit,
        kind=layer.kind,
        quant=quant,
        observed_max=model.histograms[layer.name].max,
        cutoff=percentile,
        reason=reason,
    )
