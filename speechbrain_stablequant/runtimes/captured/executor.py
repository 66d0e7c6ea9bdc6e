"""Executes a captured part of a recognizer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import openvino as ov
import torch
from openvino import opset13 as op
from torch import nn

from ...core.integer_layer import IntegerLayer
from ...core.parts import Part
from ..algorithms import geometry_of
from ..geometry import FLOAT
from ..layer_check import find_algorithms
from ..openvino_ import OpenVinoOptions
from ..openvino_.core import CompiledGraph, name_by_place, output
from ..openvino_.layer_runner import OpenVINORunner
from .calls import Call, Signature, say_uncaptured
from .capture import Captured, capture
from .decoder import decoder_forward
from .sites import Sites

#: Entries of OpenVINO's cache of prepared shapes: lengths are not padded to a
#: few here, so that most are new, and what is kept of them only takes memory.
CACHE_CAPACITY = 100


class CapturedExecutor(CompiledGraph):
    """Computes a part by its graph. Any number of threads may call it."""

    def __init__(self, graph: Captured, **options: Any):
        super().__init__(OpenVinoOptions(**options))
        self._outputs = graph.outputs
        model = _finished(graph.model, self._half)
        self.compile(model, CPU_RUNTIME_CACHE_CAPACITY=CACHE_CAPACITY)

    def __deepcopy__(self, memo: dict) -> "CapturedExecutor":
        """Copies of a module share its graph."""
        return self

    @torch.no_grad()
    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        """The module's output."""
        inputs = [x.detach().cpu().contiguous().numpy() for x in tensors]
        with self._request() as request:
            request.infer(inputs, share_inputs=True)
            places = range(len(self._outputs.read))
            found = [output(request, place) for place in places]
        return self._outputs.build(found)


def _finished(model: ov.Model, half: bool) -> ov.Model:
    """The graph to be compiled: outputs in bfloat16 if ``half``, as in
    :class:`..openvino_.graph.GraphBuilder`, and names of its own."""
    if half:
        for result in model.get_results():
            x = result.input_value(0)
            if x.get_element_type() == ov.Type.f32:
                result.input(0).replace_source_output(
                    op.convert(x, "bf16").output(0)
                )
        model.validate_nodes_and_infer_types()
    return name_by_place(model)


def part_forward(
    part: Part,
    module: nn.Module,
    integers: Mapping[str, IntegerLayer],
    **options: Any,
) -> Callable[..., Any]:
    """The forward of a part's module by its graph, with the options of
    ``backend: openvino``; weights of ``integers``, the plan's, are not read. A
    call unlike those that were captured is computed by the module itself."""
    inside = {
        name: layer
        for name, layer in integers.items()
        if name.startswith(f"{part.name}.")
    }
    if part.way == "steps":
        start = len(part.name) + 1
        layers = {name[start:]: x for name, x in inside.items()}
        return decoder_forward(module, layers, **options)
    runner = OpenVINORunner(**options)
    places = {"linear": "linear", "conv1d": "position"}
    geometries = {
        name: geometry_of(x, places[x.kind])
        for name, x in inside.items()
        if x.kind in places
    }
    found = find_algorithms(geometries, runner)
    layers = {
        name: replace(x, algorithm=found.get(name, FLOAT))
        for name, x in inside.items()
    }
    signature = Signature.loads(part.structure, part.leaves)
    sites = Sites({part.name: module}, layers)
    graph = capture(module, signature, part.way, sites, part.read)
    executor = CapturedExecutor(graph, **options)
    return partial(_forward, module, part.name, signature, executor)


def _forward(
    module: nn.Module,
    name: str,
    signature: Signature,
    executor: CapturedExecutor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    tensors = signature.tensors(Call(args, kwargs))
    if tensors is not None:
        return executor(tensors)
    say_uncaptured(name)
    return type(module).forward(module, *args, **kwargs)
