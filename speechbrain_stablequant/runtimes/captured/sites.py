"""Quantized products inside of a captured graph.

While a module is captured, each site computes by an operator of its own, which
stays in the captured graph by its number. The conversion to OpenVINO puts the
site's quantizer, its int8 constant and its bias in the operator's place, so
that no float weight is needed, and none is searched for.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import openvino as ov
import torch
from openvino.frontend.pytorch import ConversionExtension
from torch import nn

from ...core.integer_layer import AnyLayer, multiply
from ...utils.patching import shadowed
from ..forwards import layer_forwards
from ..openvino_.graph import GraphBuilder

_LIBRARY = torch.library.Library("stablequant", "DEF")
_LIBRARY.define("site(Tensor x, int number) -> Tensor")

#: Layers by number, of the capture that runs.
_capturing: list[AnyLayer] = []


def _like_output(x: torch.Tensor, number: int) -> torch.Tensor:
    """Zeros of the shape of a layer's output: values do not matter."""
    layer = _capturing[number]
    weight = torch.empty(layer.weight.shape, device="meta")
    shape = multiply(layer, x.to("meta"), weight).shape
    return x.new_zeros(shape)


_LIBRARY.impl("site", _like_output, "CompositeExplicitAutograd")
torch.library.register_fake("stablequant::site", _like_output, lib=_LIBRARY)


class Sites:
    """The sites of a module that is captured; ``modules``: it by its path."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        layers: Mapping[str, AnyLayer],
    ):
        site = torch.ops.stablequant.site
        sites = {name: partial(site, number=i) for i, name in enumerate(layers)}
        self._forwards = layer_forwards(modules, sites)
        self._layers = list(layers.values())
        self._builder = GraphBuilder(None)
        self._found: set[int] = set()
        # Products of one input share its integers.
        self._inputs: dict[tuple, tuple[ov.Output, ov.Node]] = {}

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Context in which the sites compute by the operator."""
        _capturing[:] = self._layers
        with ExitStack() as stack:
            stack.callback(_capturing.clear)
            for module, forward in self._forwards.items():
                stack.enter_context(shadowed(module, "forward", forward))
            yield

    @property
    def extensions(self) -> list[ConversionExtension]:
        """The conversion, of traced and of exported graphs."""
        return [
            ConversionExtension(name, self._convert)
            for name in ("stablequant::site", "stablequant.site.default")
        ]

    def _convert(self, context) -> list[ov.Output]:
        number = int(context.get_values_from_const_input(1))
        layer = self._layers[number]
        self._found.add(number)
        x = context.get_input(0)
        node = x.get_node()
        # With the node, so that its id stays its own.
        x, _ = self._inputs.setdefault((id(node), x.get_index()), (x, node))
        linear, conv = self._builder.linear, self._builder.conv
        compute = linear if layer.kind == "linear" else conv
        return [compute(x, layer).output(0)]

    def check(self) -> None:
        """Raise for a site that the graph does not hold."""
        for number, layer in enumerate(self._layers):
            if number not in self._found:
                raise ValueError(
                    f"layer '{layer.name}' is not in the graph that was "
                    "captured around it"
                )
