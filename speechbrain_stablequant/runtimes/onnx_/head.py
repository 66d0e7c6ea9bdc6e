"""What stands behind the encoder: described, and as nodes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ...core.encoder_spec import AnyLayer, Norm
from ...core.integer_layer import IntegerLayer, float_layer
from .graph import Graph


@dataclass(frozen=True)
class Activation:
    """An activation between the layers of a head.

    Arguments
    ---------
    op : str
        ``"Relu"``, ``"LeakyRelu"``, ``"Gelu"``, ``"Tanh"`` or
        ``"LogSoftmax"`` (over the last axis).
    slope : float
        Of LeakyRelu, below 0.
    """

    op: str
    slope: float = 0.01


_ACTIVATIONS = {nn.ReLU: "Relu", nn.Tanh: "Tanh"}

HeadPart = AnyLayer | Norm | Activation


def describe_head(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> list[HeadPart]:
    """Describes what stands behind the encoder, in the order of the modules.

    Arguments
    ---------
    modules : Mapping
        Modules by their names in the Brain's modules, such as ``enc`` and
        ``ctc_lin``; containers are walked in order.
    integers : Mapping
        Integer layers by name; others are taken as they are.

    Returns
    -------
    list of IntegerLayer, FloatLayer, Norm and Activation

    Raises
    ------
    ValueError
        A module that has no ONNX form here.

    Example
    -------
    >>> head = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 3))
    >>> [type(part).__name__ for part in describe_head({"enc": head}, {})]
    ['FloatLayer', 'Activation', 'FloatLayer']
    """
    parts: list[HeadPart] = []
    for key, module in modules.items():
        for name, child in module.named_modules(prefix=key):
            part = _head_part(name, child, integers)
            if part is not None:
                parts.append(part)
    return parts


def _head_part(
    name: str, module: nn.Module, integers: Mapping[str, IntegerLayer]
) -> HeadPart | None:
    if isinstance(module, nn.Linear):
        return integers.get(name) or float_layer(name, module)
    if isinstance(module, nn.LayerNorm):
        return Norm(
            module.weight.detach().float(),
            module.bias.detach().float(),
            module.eps,
        )
    if isinstance(module, nn.LeakyReLU):
        return Activation("LeakyRelu", module.negative_slope)
    for kind, op in _ACTIVATIONS.items():
        if isinstance(module, kind):
            return Activation(op)
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return Activation("Gelu")
    if isinstance(module, nn.LogSoftmax) and module.dim == -1:
        return Activation("LogSoftmax")
    if isinstance(module, nn.Identity | nn.Dropout) or any(module.children()):
        return None
    raise ValueError(
        f"{name}: {type(module).__name__} in the head has no ONNX form; "
        "export the encoder alone (head=[])"
    )


def add_head(graph: Graph, x: str, head: Iterable[HeadPart]) -> str:
    for part in head:
        if isinstance(part, Norm):
            x = graph.norm(x, part)
        elif isinstance(part, Activation):
            options = {
                "LeakyRelu": {"alpha": part.slope},
                "LogSoftmax": {"axis": -1},
            }
            x = graph.add(part.op, [x], **options.get(part.op, {}))
        else:
            x = graph.linear(x, part)
    return x
