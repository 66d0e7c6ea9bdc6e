"""StableQuant-plus: a pipeline of parts, each with its own switch.

In order: rotation of the residual stream, equalization, clipping percentiles
by layer or unit, inputs that stay float, bits under a budget, scales of least
squared error, rounding with error compensation, bias correction.

StableQuant decides by word errors. Here each part changes little, and word
errors are too few to tell: the divergence from the float model's outputs
decides (see :mod:`..search.divergence`).
"""

from collections.abc import Container, Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from ...core.layer_quant import LayerQuant, LayerTensors
from ...core.plan_tensors import AdjustedTensors
from ...model.layers import Layer, layer_names
from ..adaround import AdaRound
from ..layerwise.gptq import Compensate
from ..layerwise.reconstruct import rounded_layers
from ..session.calibration import Calibration
from ..session.session import Planned, Session
from ..stablequant import selection_rules
from .bits import choose_unit_bits
from .clipping import choose_percentiles, confirm_percentiles
from .float_inputs import choose_float_inputs
from .quarot import is_rotated, rotated, rotated_parameters
from .smoothquant import (
    Site,
    channel_maxima,
    equalized,
    equalized_parameters,
    factors,
    find_sites,
)
from .work import Work


def plus_plan(
    session: Session, weights: str, calibration: Calibration
) -> Planned:
    """The plan, and histograms of the rotated and equalized model.

    ``calibration``: of the float model, before rotation and equalization.
    ``search["parts"]`` of the plan has the divergence after each part.
    """
    work = Work(session, weights, calibration)
    work.search_set.keep_float_outputs()
    with ExitStack() as stack:
        stack.callback(session.simulator.reset)
        stack.enter_context(rotated(work.rotated, session.config.seed))
        strength, by_site = _best_equalization(work)
        stack.enter_context(equalized(by_site))
        work.calibrate(strength)
        units, harms = choose_percentiles(work)
        choose_float_inputs(work, harms)
        confirm_percentiles(work)
        choose_unit_bits(work)
        quants = work.quants()
        work.divergence(quants, "scales")
        selected = {unit.name for unit in units if unit.selected}
        tensors = _rounded(work, quants, selected, bool(by_site))
        # A parameter that both changed has its present value in both.
        changed = equalized_parameters(by_site)
        changed |= rotated_parameters(work.rotated)
        floats = {
            name: value.detach().clone()
            for name, value in changed.items()
            if name.removesuffix(".weight") not in quants
        }
        scores = work.word_errors(quants, tensors)
    record = work.search_set.record(*scores)
    if session.config.plus.cutoffs == "units":
        record |= selection_rules(session)
    record |= {"parts": work.measured, "runtimes": list(session.runtimes)}
    plan, histograms = session.assemble(
        weights,
        units=units,
        quants=quants,
        histograms=work.calibration.histograms,
        residual_amax=work.calibration.residual,
        cutoffs=work.percentiles,
        reason=lambda layer: _reason(work, layer, quants.get(layer.name)),
        search=record,
    )
    adjusted = AdjustedTensors(tensors, floats)
    return replace(plan, tensors=adjusted or None), histograms


def _best_equalization(work: Work) -> tuple[float, dict[Site, torch.Tensor]]:
    """The strength with the least divergence, and its factors; 0 for none."""
    session, plus = work.session, work.session.config.plus
    sites = [
        site
        for site in find_sites(session.encoders, session.clipped_layers)
        if plus.equalize and not is_rotated(site.producer, work.rotated)
    ]
    if not sites:
        return 0.0, {}
    maxima = channel_maxima(sites, session.recognizer)
    found = []
    for strength in sorted({0.0, *plus.strengths}):
        by_site = {
            site: factors(site, maxima[site], strength)
            for site in sites
            if strength
        }
        with equalized(by_site):
            work.calibrate(strength)
            harm = work.divergence(work.quants(), "equalize", strength=strength)
        found.append((harm, strength, by_site))
    _, best, by_site = min(found, key=lambda row: row[:2])
    return best, by_site


def _rounded(
    work: Work,
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
    compensated = Compensate(plus.damping, plus.earlier_errors)
    without_effect = _convs_before_group_norm(session)
    without_effect |= {n for n, quant in quants.items() if quant.weight_only}

    def solve(layer: Layer) -> AdaRound | Compensate | None:
        if plus.adaround and layer.unit in selected:
            return session.config.adaround
        return compensated if plus.compensate else None

    tensors = rounded_layers(
        session,
        work.weights,
        work.calibration.in_order,
        quants,
        "plus",
        solve,
        lambda x: plus.bias_correction and x.name not in without_effect,
    )
    if plus.bias_correction:
        without = {name: replace(t, bias=None) for name, t in tensors.items()}
        plain = work.divergence(quants, "rounding", without)
        harm = work.divergence(quants, "rounding and biases", tensors)
        return tensors if harm < plain else without
    if rounds:
        work.divergence(quants, "rounding", tensors)
    return tensors


def _convs_before_group_norm(session: Session) -> set[str]:
    """Convolutions whose bias a per-channel normalization removes."""
    modules = (
        part.conv
        for encoder in session.encoders
        for part in encoder.model.feature_extractor.conv_layers
        if isinstance(getattr(part, "layer_norm", None), nn.GroupNorm)
    )
    return layer_names(session.layers, modules)


def _reason(work: Work, layer: Layer, quant: LayerQuant | None) -> str:
    if quant is None:
        return work.float_layers[layer.name]
    if layer.name in work.float_inputs:
        return work.float_inputs[layer.name]
    percentile = work.percentiles[layer.name]
    reason = f"cut at {percentile:g} %, then smallest squared error"
    if quant.activation_offset:
        reason += "; offset for an input behind a GELU"
    return reason
