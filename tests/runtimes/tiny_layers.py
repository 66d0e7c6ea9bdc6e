"""Layers and encoders that the tests of several runtimes compute."""

import torch

from speechbrain_stablequant.core.encoder_spec import describe_encoder
from speechbrain_stablequant.core.integer_layer import IntegerLayer
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.model.rotation import (
    attach_rotation,
    random_rotation,
)
from speechbrain_stablequant.runtimes.cpu import (
    cpu_class,
    executed_integers,
)


def executed(modules, target, bits=(8, 8), keep_float=()):
    """The integers that this CPU computes with; layers with one of these words
    in their names stay float."""
    return executed_integers(
        {
            x.name: integer_layer(x, LayerQuant(*bits, 3.0))
            for x in find_layers(modules, target)
            if not any(part in x.name for part in keep_float)
        },
        cpu_class(),
    )


def describe(model, bits=(8, 8), keep_float=()):
    """An encoder as this CPU executes it."""
    integers = executed({"w": model}, ["w"], bits, keep_float)
    return describe_encoder(model, "w", integers)


def lopsided_integers(model, quants):
    """Integers with activation offsets; rotates the model where it can."""
    if model.config.do_stable_layer_norm:
        attach_rotation(model.encoder, random_rotation(32))
    layers = find_layers({"w": model}, ["w"])
    return {x.name: integer_layer(x, quants[x.name]) for x in layers}


def describe_lopsided(model, quants):
    """An encoder with these as this CPU executes it."""
    integers = lopsided_integers(model, quants)
    spec = describe_encoder(
        model, "w", executed_integers(integers, cpu_class())
    )
    assert {x.zero_point() for x in spec.blocks[0].layers()} > {0}
    return spec


def worst_case(shape, kind, **geometry) -> IntegerLayer:
    """Weights at both ends of their range, scales that round nothing."""
    weight = torch.full(shape, 127, dtype=torch.int8)
    weight[1::2] = -127
    weight[0, ::3] = -127
    layer = IntegerLayer(
        "w",
        kind,
        weight,
        torch.full(shape[:1], 0.5),
        8,
        torch.tensor([0.25]),
        8,
        None,
        **geometry,
    )
    # Without VNNI the registry hands the runtime 7-bit weights.
    return executed_integers({"": layer}, cpu_class())[""]


def extremes(*shape) -> torch.Tensor:
    """Integers of which each row is all 127, all -127 or a mixture."""
    q = torch.full(shape, 127, dtype=torch.int8)
    q[..., 1::3, :] = -127
    q[..., 2::3, ::2] = -127
    return q
