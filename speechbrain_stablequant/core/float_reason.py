"""What stays in floating point, and why: a sentence each.

Whoever decides writes it, where the plan keeps it:

- :mod:`..model.layers` finds what can be quantized. What it leaves out has no
  row in the plan; :func:`float_reason` says which of its rules applied.
- ``runtimes/captured/select.py`` times the parts of a recognizer. Layers of one
  that is fastest in floating point are integers on disk, :func:`weights_alone`.
- A method keeps layers float: ``Work.float_layers`` in ``methods/plus``.
"""

from collections.abc import Iterable, Mapping

from torch import nn

from ..model.layer import Layer, layer_kind
from ..model.layers import LEAST_WEIGHTS, weight_only_names
from ..model.products import virtual_linears
from .parts import Part
from .plan import QuantizationPlan

ADDED = "added or scaled, not multiplied as a matrix"


def weights_alone(
    parts: Iterable[Part], layers: Iterable[Layer]
) -> dict[str, str]:
    """Layers whose weights alone are quantized, by name, with the reason."""
    floats = [part.name for part in parts if part.executes == "float"]
    return {
        layer.name: f"weights alone: '{name}' is as fast in floating point"
        for layer in layers
        for name in floats
        if layer.name == name or layer.name.startswith(f"{name}.")
    }


def float_reason(
    name: str, plan: QuantizationPlan, by_name: Mapping[str, nn.Module]
) -> str:
    """Why a parameter that a plan leaves float stays so; an empty name:
    products of activations. ``by_name``: as of :func:`.modules_by_name`."""
    if not name:
        return "both operands are activations"
    owner, _, attribute = name.rpartition(".")
    module = by_name.get(owner, nn.Identity())
    norm = "norm" in type(module).__name__.lower()
    if norm or attribute.startswith(("bias", "in_proj_bias")):
        return ADDED
    rows = virtual_linears(module).items()
    parts = [f"{owner}.{n}" for n, x in rows if x.weight_name == attribute]
    decided = {x.name: x.reason for x in plan.layers if x.quant is None}
    for layer in (owner, *parts):
        if layer in decided:
            return decided[layer]
    alone = attribute in weight_only_names(module)
    if alone and module.get_parameter(attribute).numel() < LEAST_WEIGHTS:
        return "too small for integers to pay"
    is_layer = attribute == "weight" and layer_kind(module) is not None
    if alone or is_layer or parts:
        return "excluded, or not below quantize.target"
    return "no product that is known by its module"
