"""Single layers in ONNX Runtime, for comparison with exact arithmetic."""

import torch

from ...core.integer_layer import AnyLayer
from ..geometry import CONVOLUTION, FLOAT, NATIVE, Geometry
from ..trial_layer import Results, Trial
from .encoder import conv_as_product, position
from .executor import onnxruntime, open_session
from .graph import Graph


class OnnxRunner:
    """Computes layers as the exported graph does."""

    name = "onnx"

    def __init__(self, threads: int | None = None, provider: str = "cpu"):
        self._threads, self._provider = threads, provider
        version = onnxruntime().__version__
        self.versions = {"onnxruntime": version, "provider": provider}

    def half(self, geometry: Geometry) -> bool:
        return False

    def algorithms(self, geometry: Geometry) -> tuple[str, ...]:
        ways = (NATIVE, CONVOLUTION) if geometry.is_conv else (NATIVE,)
        return (*ways, FLOAT) if geometry.weight_bits else ways

    def run(self, geometry: Geometry, trial: Trial) -> Results:
        graph = Graph(unsigned=True)
        x, out = graph.name("x"), graph.name("out")
        inputs = {x: [1, "time", geometry.shape[1] * geometry.groups]}
        y = _product(graph, geometry, trial.layer, x)
        if geometry.then == "gelu":
            y = graph.add("Gelu", [y])
        elif geometry.then == "sum":
            other = graph.name("other")
            inputs[other] = [1, "frames", geometry.shape[0]]
            y = graph.add("Add", [other, y])
        graph.result(y, out)
        shape = [1, "rows", geometry.shape[0]]
        model = graph.model(inputs, out, shape, {})
        content = model.SerializeToString()
        session = open_session(content, self._threads, self._provider)
        found = []
        for one, other in zip(trial.inputs, trial.others, strict=True):
            given = {"x": one.numpy()}
            if geometry.then == "sum":
                given["other"] = other.numpy()
            (result,) = session.run(None, given)
            found.append(torch.from_numpy(result))
        return Results(found)


def _product(graph: Graph, geometry: Geometry, layer: AnyLayer, x: str) -> str:
    if geometry.place == "position":
        return position(graph, layer, x, (geometry.shape[2] + 1) % 2)
    if geometry.is_conv:
        return conv_as_product(graph, x, layer)
    return graph.linear(x, layer)
