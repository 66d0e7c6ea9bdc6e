"""StableQuant-plus: a pipeline of parts, each with its own switch.

In order: rotation of the residual stream, equalization, clipping percentiles
by layer or unit, scales of least squared error, bits under a budget, rounding
with error compensation, bias correction.

StableQuant decides by word errors. Here each part changes little, and word
errors are too few to tell: the divergence from the float model's outputs
decides (see :mod:`..search.divergence`).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial

from torch import nn

from ...core.histogram import Histogram
from ...core.plan import LayerPlan, LayerQuant, QuantizationPlan, UnitPlan
from ...core.plan_tensors import AdjustedTensors, LayerTensors
from ...model.layers import Layer
from ..layerwise import AdaRound, Compensate
from ..session import (
    Calibration,
    Session,
    keep_float_outputs,
    rounded_layers,
    search_evaluate,
)
from ..stablequant import search_units
from .bits import choose_unit_bits
from .layer_clipping import search_layers
from .quarot import is_rotated, rotated, rotated_floats
from .scales import full_range_quant, least_error_quant, least_error_quants
from .smoothquant import (
    ChannelMaxima,
    Site,
    changed_floats,
    equalized,
    factors,
    find_sites,
)
from .work import FloatModel, Work


def plus_plan(
    session: Session, weights: str, calibration: Calibration
) -> tuple[QuantizationPlan, dict[str, Histogram]]:
    """Makes the plan of ``method: stablequant_plus``.

    Arguments
    ---------
    session : Session
        The recognizer, its config and its layers.
    weights : str
        Fingerprint of the float model.
    calibration : Calibration
        Of the float model, before rotation and equalization.

    Returns
    -------
    QuantizationPlan
        ``search["parts"]`` has the divergence after each part.
    dict
        The histograms of the rotated and equalized model.
    """
    work = Work(session, weights, calibration)
    keep_float_outputs(session)
    with ExitStack() as stack:
        stack.callback(work.reset_simulator)
        stack.enter_context(rotated(work.rotated, session.config.seed))
        work.reset_simulator()
        sites = [
            site
            for site in find_sites(session.encoders, session.layers)
            if not is_rotated(site.producer, work.rotated)
        ]
        strength = 0.0
        if session.config.plus.equalize and sites:
            strength, context = _best_strength(work, sites)
            stack.enter_context(context)
            work.reset_simulator()
        model = work.model_now(strength)
        plan = _decide(work, model, sites if strength else [])
        return plan, model.histograms


def _best_strength(
    work: Work, sites: Sequence[Site]
) -> tuple[float, AbstractContextManager[None]]:
    """The equalization with the least divergence: strength and context."""
    session = work.session
    maxima = ChannelMaxima([site.consumers[0] for site in sites])
    with maxima.watch():
        session.recognizer.forward("calibration", lambda _: None)
    maxima.join()

    def context(strength: float) -> AbstractContextManager[None]:
        if not strength:
            return nullcontext()
        by_site = {
            site.name: factors(
                site, maxima.values[site.consumers[0].name], strength
            )
            for site in sites
        }
        return equalized(sites, by_site)

    found: list[tuple[float, float]] = []
    for strength in sorted({0.0, *session.config.plus.strengths}):
        with context(strength):
            work.reset_simulator()
            model = work.model_now(strength)
            quants = least_error_quants(work, model, {}, {})
            harm = work.divergence(model, quants, "equalize", strength=strength)
        found.append((harm, strength))
    work.reset_simulator()
    _, best = min(found)
    return best, context(best)


def _decide(
    work: Work, model: FloatModel, sites: Sequence[Site]
) -> QuantizationPlan:
    """All parts after equalization, whose sites are given if it helped."""
    session, plus = work.session, work.session.config.plus
    units, percentiles = _percentiles(work, model)
    bits = choose_unit_bits(work, model, percentiles)
    quants = least_error_quants(work, model, percentiles, bits)
    work.divergence(model, quants, "scales")
    tensors: dict[str, LayerTensors] = {}
    rounds = plus.compensate or plus.adaround
    if sites or work.rotated or rounds or plus.bias_correction:
        tensors = _round(work, model, quants, units)
    if rounds and not plus.bias_correction:
        work.divergence(model, quants, "rounding", tensors)
    if plus.bias_correction:
        tensors = _with_useful_biases(work, model, quants, tensors)
    baseline, final = work.word_errors(model, quants, tensors)
    floats = changed_floats(sites, quants)
    # A parameter that both changed has its present value in both.
    floats |= rotated_floats(work.rotated, quants)
    adjusted = AdjustedTensors(tensors, floats)
    layers = [
        _layer_plan(work, layer, model, percentiles, quants.get(layer.name))
        for layer in session.layers
    ]
    search = session.config.search
    record = {
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
    plan = session.assemble(work.original.weights, units, layers, record)
    return replace(plan, tensors=adjusted if adjusted else None)


def _percentiles(
    work: Work, model: FloatModel
) -> tuple[list[UnitPlan], dict[str, float]]:
    """Units, and the clipping percentile of each layer."""
    session = work.session
    units = [UnitPlan(name) for name in session.units]
    if session.config.plus.cutoffs == "none":
        return units, {}
    if session.config.plus.cutoffs == "layers":
        return units, _layer_percentiles(work, model)
    evaluate, journal, bar = search_evaluate(
        session, model.weights, model.calibration
    )
    _, units = search_units(
        session, evaluate, bar, partial(full_range_quant, work, model)
    )
    work.evaluations += journal.measured + journal.reused
    by_unit = {unit.name: unit.cutoff for unit in units}
    return units, {x.name: by_unit[x.unit] for x in session.layers}


def _layer_percentiles(work: Work, model: FloatModel) -> dict[str, float]:
    """Clipping percentile of each layer by the divergence it causes."""
    session = work.session
    evaluate, journal, bar = search_evaluate(
        session, model.weights, model.calibration, "divergence"
    )
    by_name = {layer.name: layer for layer in session.layers}
    names = {
        unit: [x.name for x in layers if x.name not in work.float_layers]
        for unit, layers in session.units.items()
    }
    with bar:
        # Most layers need the first percentile and a worse one only.
        bar.total = 2 * sum(map(len, names.values()))
        found = search_layers(
            names,
            session.config.search.cutoffs,
            lambda name, percentile: least_error_quant(
                work, by_name[name], model, percentile
            ),
            evaluate,
        )
    work.evaluations += journal.measured + journal.reused
    curves = {x.layer: [list(row) for row in x.curve] for x in found}
    work.parts.append({"part": "cutoffs", "layers": curves})
    return {x.layer: x.cutoff for x in found}


def _round(
    work: Work,
    model: FloatModel,
    quants: Mapping[str, LayerQuant],
    units: Sequence[UnitPlan],
) -> dict[str, LayerTensors]:
    """Integers and biases, each layer after the ones before it."""
    plus = work.session.config.plus
    selected = {unit.name for unit in units if unit.selected}
    settings = asdict(work.session.config.adaround)
    settings.pop("calibrator")
    learned = AdaRound(**settings)
    compensated = Compensate(plus.damping, plus.earlier_errors)
    without_effect = _convs_before_group_norm(work.session)

    def solve(layer: Layer):
        if plus.adaround and layer.unit in selected:
            return learned
        return compensated if plus.compensate else None

    return rounded_layers(
        work.session,
        model.weights,
        model.calibration.in_order,
        quants,
        "plus",
        solve,
        lambda x: plus.bias_correction and x.name not in without_effect,
    )


def _with_useful_biases(
    work: Work,
    model: FloatModel,
    quants: Mapping[str, LayerQuant],
    tensors: Mapping[str, LayerTensors],
) -> dict[str, LayerTensors]:
    """With the corrected biases if they reduce the divergence."""
    without = {name: replace(t, bias=None) for name, t in tensors.items()}
    plain = work.divergence(model, quants, "rounding", without)
    harm = work.divergence(model, quants, "rounding and biases", tensors)
    return dict(tensors) if harm < plain else without


def _convs_before_group_norm(session: Session) -> set[str]:
    """Convolutions whose bias a per-channel normalization removes."""
    modules = {
        id(part.conv)
        for encoder in session.encoders
        for part in encoder.model.feature_extractor.conv_layers
        if isinstance(getattr(part, "layer_norm", None), nn.GroupNorm)
    }
    return {x.name for x in session.layers if id(x.module) in modules}


def _layer_plan(
    work: Work,
    layer: Layer,
    model: FloatModel,
    percentiles: Mapping[str, float],
    quant: LayerQuant | None,
) -> LayerPlan:
    percentile = percentiles.get(layer.name, 100.0)
    if layer.name in work.float_layers:
        reason = "stays float: it takes in the audio itself"
    elif quant is None:
        reason = "stays float: its unit suffers more than its size is worth"
    else:
        words = [f"cut at {percentile:g} %, then smallest squared error"]
        if quant.activation_offset:
            words.append("offset for an input behind a GELU")
        reason = "; ".join(words)
    return LayerPlan(
        name=layer.name,
        unit=layer.unit,
        kind=layer.kind,
        quant=quant,
        observed_max=model.histograms[layer.name].max,
        cutoff=percentile,
        reason=reason,
    )
