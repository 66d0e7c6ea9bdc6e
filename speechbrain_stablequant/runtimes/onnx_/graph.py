"""Collects the nodes and constants of an ONNX graph."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...core.affine import qmax
from ...core.encoder_spec import Norm
from ...core.integer_layer import AnyLayer, FloatLayer, IntegerLayer
from ..geometry import FLOAT

# The first opset with Gelu; the IR version that goes with it.
OPSET, IR_VERSION = 20, 9


def require_onnx() -> Any:
    """The onnx package; ImportError names the extra that brings it."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "export: package 'onnx' is not installed; run "
            "pip install 'speechbrain_stablequant[onnx]'"
        ) from error
    return onnx


class Graph:
    """Collects nodes and constants of an ONNX graph.

    ``unsigned``: activations are uint8 with zero point 128 instead of int8 with
    0, each moved by the layer's own zero point.
    """

    def __init__(self, unsigned: bool = False):
        self.onnx = require_onnx()
        self.unsigned = unsigned
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._names: dict[str, int] = {}
        self._constants: dict[tuple, str] = {}
        self._quantized: dict[tuple, str] = {}

    def model(
        self,
        inputs: Mapping[str, Sequence[str | int]],
        output: str,
        shape: Sequence[str | int],
        metadata: Mapping[str, str],
    ) -> Any:
        """The finished model with one float32 output. Inputs are float32
        except ``lengths``, int64."""
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        given, made = (
            [
                helper.make_tensor_value_info(
                    name,
                    kinds.INT64 if name == "lengths" else kinds.FLOAT,
                    axes,
                )
                for name, axes in values.items()
            ]
            for values in (inputs, {output: shape})
        )
        name = "speechbrain_stablequant"
        model = helper.make_model(
            helper.make_graph(self.nodes, name, given, made, self.initializers),
            producer_name=name,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )
        helper.set_model_props(model, metadata)
        return model

    def name(self, stem: str) -> str:
        """A name that is not used yet."""
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return f"{stem}_{count}" if count else stem

    def add(
        self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes
    ) -> Any:
        """Add a node; return the name of its output, or the list of names."""
        names = [self.name(op) for _ in range(outputs)]
        make, name = self.onnx.helper.make_node, f"{names[0]}/{op}"
        self.nodes.append(make(op, list(inputs), names, name, **attributes))
        return names[0] if outputs == 1 else names

    def result(self, x: str, name: str) -> None:
        """Give a value the name of the output, reserved by :meth:`name`."""
        self.nodes.append(self.onnx.helper.make_node("Identity", [x], [name]))

    def tensor(self, value: torch.Tensor, name: str) -> str:
        """Store a tensor and return its name."""
        return self._store(np.ascontiguousarray(value.numpy()), name)

    def _store(self, array: np.ndarray, stem: str) -> str:
        name = self.name(stem)
        self.initializers.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Name of a small constant; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._store(array, "constant")
        return self._constants[key]

    def number(self, value: float) -> str:
        """Name of a float32 scalar."""
        return self.constant(value, np.float32)

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape: 0 keeps an axis, -1 is inferred."""
        return self.add("Reshape", [x, self.constant(shape)])

    def transpose(self, x: str, *axes: int) -> str:
        """Permutes the axes."""
        return self.add("Transpose", [x], perm=list(axes))

    def size(self, x: str, axis: int) -> str:
        """Length of one axis, int64 [1]."""
        return self.add("Shape", [x], start=axis, end=axis + 1)

    def slice(self, x: str, start: str, end: str, axis: int, step=1) -> str:
        """A range of one axis; start and end are int64 [1]."""
        axes, steps = self.constant([axis]), self.constant([step])
        return self.add("Slice", [x, start, end, axes, steps])

    def _zero(self, layer: IntegerLayer) -> str:
        if self.unsigned:
            return self.constant(128 + layer.zero_point(), np.uint8)
        return self.constant(layer.zero_point(), np.int8)

    def quantize(
        self, x: str, layer: AnyLayer, lowest: float = -float("inf")
    ) -> str:
        """A layer's input as int8 (uint8) integers for :meth:`dequantize`;
        unchanged for a float layer. ``lowest``: known lower bound of ``x``."""
        if isinstance(layer, FloatLayer):
            return x
        scale = np.float32(layer.activation_scale.item())
        limit, zero = qmax(layer.activation_bits), layer.zero_point()
        key = (x, float(scale), limit, zero)
        if key not in self._quantized:
            low = np.float32(-limit - zero) * scale
            high = np.float32(limit - zero) * scale
            # QuantizeLinear itself ends at 127.
            if limit < 127 or lowest < low:
                x = self.add("Clip", [x, self.number(low), self.number(high)])
            inputs = [x, self.number(scale), self._zero(layer)]
            self._quantized[key] = self.add("QuantizeLinear", inputs)
        return self._quantized[key]

    def dequantize(self, q: str, layer: AnyLayer) -> str:
        """The float values of the integers of :meth:`quantize`."""
        if isinstance(layer, FloatLayer):
            return q
        scale = self.number(layer.activation_scale.item())
        return self.add("DequantizeLinear", [q, scale, self._zero(layer)])

    def weight(self, layer: AnyLayer, weight: torch.Tensor, axis: int) -> str:
        """Name of a layer's float weight; ``axis``: of its output channels."""
        integers = isinstance(layer, IntegerLayer)
        if integers and layer.algorithm == FLOAT:
            # Stored as floats: integers would be multiplied as integers.
            shape = [1] * weight.dim()
            shape[axis] = -1
            weight = weight.float() * layer.weight_scale.view(shape)
            integers = False
        stored = self.tensor(weight.contiguous(), f"{layer.name}.weight")
        if not integers:
            return stored
        scale = self.tensor(layer.weight_scale, f"{layer.name}.weight_scale")
        zeros = self.constant(np.zeros(layer.weight_scale.shape), np.int8)
        return self.add("DequantizeLinear", [stored, scale, zeros], axis=axis)

    def product(self, q: str, layer: AnyLayer, weight: torch.Tensor) -> str:
        """Integers [..., K] times a weight [K, N], with the bias."""
        x = self.dequantize(q, layer)
        out = self.add("MatMul", [x, self.weight(layer, weight, 1)])
        return self.biased(out, layer)

    def biased(self, x: str, layer: AnyLayer) -> str:
        """Adds the bias, if any, along the last axis."""
        if layer.bias is None:
            return x
        bias = self.tensor(layer.bias, f"{layer.name}.bias")
        return self.add("Add", [x, bias])

    def linear(
        self, x: str, layer: AnyLayer, lowest: float = -float("inf")
    ) -> str:
        """A Linear on a float input [..., K]."""
        q = self.quantize(x, layer, lowest)
        return self.product(q, layer, layer.weight.t())

    def convolution(self, q: str, layer: AnyLayer) -> str:
        """A Conv1d on the integers [batch, channels, time] of its input."""
        inputs = [self.dequantize(q, layer)]
        inputs.append(self.weight(layer, layer.weight, 0))
        if layer.bias is not None:
            inputs.append(self.tensor(layer.bias, f"{layer.name}.bias"))
        return self.add(
            "Conv",
            inputs,
            # TensorRT's parser does not infer it from dequantized weights.
            kernel_shape=[layer.weight.shape[-1]],
            strides=[layer.stride],
            pads=[layer.padding] * 2,
            dilations=[layer.dilation],
            group=layer.groups,
        )

    def norm(self, x: str, norm: Norm | None) -> str:
        """A norm: [..., channels], or [batch, channels, time] over time."""
        if norm is None:
            return x
        weight = self.tensor(norm.weight, "norm.weight")
        inputs = [x, weight, self.tensor(norm.bias, "norm.bias")]
        if norm.over_time:
            return self.add("InstanceNormalization", inputs, epsilon=norm.eps)
        return self.add("LayerNormalization", inputs, axis=-1, epsilon=norm.eps)

    def standardize(self, x: str, axes: Sequence[int]) -> str:
        """Mean 0 and variance 1 over some axes."""
        over = self.constant(axes)
        centered = self.add("Sub", [x, self.add("ReduceMean", [x, over])])
        square = self.add("Mul", [centered, centered])
        variance = self.add("ReduceMean", [square, over])
        safe = self.add("Add", [variance, self.number(1e-5)])
        return self.add("Div", [centered, self.add("Sqrt", [safe])])
