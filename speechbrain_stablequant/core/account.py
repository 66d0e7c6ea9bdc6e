"""What of a recognizer a plan quantizes, by parameters and multiply-adds."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from ..model.products import RowsLinear, modules_by_name, tied_parameters
from .float_reason import ADDED, float_reason
from .plan import QuantizationPlan
from .plan_tensors import parameters_by_name

_ROWS = 8  #: rows of the largest float parts

# One row of that name stands for all of them.
_SMALL = "biases and normalizations"


def account(
    plan: QuantizationPlan,
    modules: Mapping[str, nn.Module],
    products: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Shares of a model that are quantized, weight-only and float.

    ``products``: multiply-adds of one batch by layer, by parameter, and of
    activations under an empty name. The largest float parts come with the
    reason.
    """
    by_name, rows = modules_by_name(modules), {x.name: x for x in plan.layers}
    shares = {"quantized": 0, "weight_only": 0, "float": 0}
    counts = {"parameters": dict(shares), "products": dict(shares)}
    products = dict(products or {})
    left, first = _parameters(modules)
    tied = tied_parameters(modules, plan.quants())
    for name, layer in tied.items():
        # Counted by the parameter: the caller of its owner multiplies.
        products[layer] = products.get(layer, 0) + products.pop(name, 0)
    for name in (x for x in plan.weight_only if x not in tied):
        name = first.get(name, name)
        counts["parameters"]["weight_only"] += left.pop(name, 0)
        counts["products"]["weight_only"] += products.pop(name, 0)
    for name, quant in plan.quants().items():
        module, numel = by_name[name], by_name[name].weight.numel()
        share = "weight_only" if quant.weight_only else "quantized"
        counts["parameters"][share] += numel
        counts["products"][share] += products.pop(name, 0)
        weight = f"{name}.weight"
        if isinstance(module, RowsLinear):
            weight = f"{name.rpartition('.')[0]}.{module.weight_name}"
            weight = first.get(weight, weight)
            left[weight] = left.get(weight, 0) - numel
        else:
            left.pop(first.get(weight, weight), None)
    floats = {n: [size, 0] for n, size in left.items() if size}
    reason = partial(float_reason, plan=plan, by_name=by_name)
    small = [n for n in floats if reason(n) == ADDED]
    if small:
        floats[_SMALL] = [sum(floats.pop(n)[0] for n in small), 0]
    for name, count in products.items():
        key = f"{name}.weight" if name in rows else name
        floats.setdefault(key, [0, 0])[1] += count
    for i, kind in enumerate(("parameters", "products")):
        counts[kind]["float"] = sum(row[i] for row in floats.values())
    totals = [max(sum(counts[kind].values()), 1) for kind in counts]

    def weight(row: list[int]) -> float:
        return max(x / total for x, total in zip(row, totals, strict=True))

    largest = sorted(floats, key=lambda n: weight(floats[n]), reverse=True)
    counts["largest_float"] = [
        {
            "name": name or "products of activations",
            "parameters": floats[name][0],
            "products": floats[name][1],
            "why": ADDED if name == _SMALL else reason(name),
        }
        for name in largest[:_ROWS]
    ]
    if not any(counts["products"].values()):
        counts["products"] = None
    return counts


def layer_sizes(
    plan: QuantizationPlan, modules: Mapping[str, nn.Module]
) -> dict[str, int]:
    """Number of weights of each layer of a plan."""
    by_name = modules_by_name(modules)
    return {x.name: by_name[x.name].weight.numel() for x in plan.layers}


def _parameters(
    modules: Mapping[str, nn.Module],
) -> tuple[dict[str, int], dict[str, str]]:
    """Size of each parameter once, under its first name, of a weight norm the
    larger part; and the first name by each of its names."""
    names: dict[nn.Parameter, str] = {}
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, parameter in parameters_by_name(modules).items():
        if ".parametrizations.weight." in name:
            name = name.partition(".parametrizations.")[0] + ".weight"
        known = first[name] = names.setdefault(parameter, name)
        sizes[known] = max(sizes.get(known, 0), parameter.numel())
    return sizes, first
