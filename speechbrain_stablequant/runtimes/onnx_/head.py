"""The layers after the encoder: their description and their ONNX nodes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...core.encoder_spec import AnyLayer, Norm
from ...core.integer_layer import IntegerLayer, float_layer
from .graph import Graph


@dataclass(frozen=True)
class Activation:
    """An activation in a head: an ONNX operator and its attributes."""

    op: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


HeadPart = AnyLayer | Norm | Activation


def describe_head(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> list[HeadPart]:
    """Describe the modules after the encoder, in order; containers are
    walked. ValueError for a module without an ONNX form."""
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
        return Activation("LeakyRelu", {"alpha": module.negative_slope})
    if isinstance(module, nn.ReLU | nn.Tanh):
        return Activation("Relu" if isinstance(module, nn.ReLU) else "Tanh")
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return Activation("Gelu")
    if isinstance(module, nn.LogSoftmax) and module.dim == -1:
        return Activation("LogSoftmax", {"axis": -1})
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
            x = graph.add(part.op, [x], **part.attributes)
        else:
            x = graph.linear(x, part)
    return x
