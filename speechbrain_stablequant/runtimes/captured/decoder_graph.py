"""Whisper's decoder as two graphs: one step, and the keys and values of the
encoder's states, once for each utterance.

Integers are multiplied as floats, with inputs on the plan's grid: a step reads
its weights once, so that their bytes take the time, and the numbers are those
of the simulation. Past keys and values are a state of the request.
"""

from collections.abc import Mapping

import numpy as np
import openvino as ov
from openvino import opset6
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
from torch import nn

from ...core.affine import qmax
from ...core.integer_layer import AnyLayer, IntegerLayer, float_layer
from ...model import products
from ..openvino_.core import name_by_place
from ..openvino_.graph import GraphBuilder, _f32, _i64
from .calls import CaptureError

_CLASS = "transformers.models.whisper.modeling_whisper.WhisperDecoder"
#: The tied output projection, by the name of its virtual linear.
PROJECTION = "output_projection"


def is_decoder(module: nn.Module) -> bool:
    """Whether a module is a decoder that has such graphs."""
    return _CLASS in products.class_names(module)


class DecoderGraphs:
    """Builds the graphs of a decoder, transformers' WhisperDecoder; ``layers``
    by path inside of it, others are float."""

    def __init__(self, decoder: nn.Module, layers: Mapping[str, AnyLayer]):
        if decoder.config.activation_function != "gelu":
            raise CaptureError("its activation is not GELU")
        self._decoder = decoder
        self._layers = layers
        self._builder = GraphBuilder(None)
        self._heads = decoder.layers[0].self_attn.num_heads
        self._size = decoder.layers[0].self_attn.head_dim
        self.projects = PROJECTION in layers

    def _layer(self, path: str) -> AnyLayer:
        found = self._layers.get(path)
        if found is None:
            found = float_layer(path, self._decoder.get_submodule(path))
        return found.loaded()

    # -- keys and values of the encoder's states -----------------------------

    def cross(self) -> ov.Model:
        """From states [utterances, time, width] to the keys, transposed, and
        the values of each block."""
        width = self._heads * self._size
        states = self._builder.input("states", [-1, -1, width])
        results = []
        for i in range(len(self._decoder.layers)):
            for name, order in (("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
                layer = self._layer(f"layers.{i}.encoder_attn.{name}_proj")
                y = self._builder.linear(states, layer)
                results.append(op.result(self._split(y, order)))
        return name_by_place(ov.Model(results, [states], "cross"))

    # -- one step ------------------------------------------------------------

    def step(self) -> ov.Model:
        """From embedded tokens [rows, tokens, width], which past row each row
        continues [rows], and the mask [1, 1, tokens, past + tokens], then the
        keys and values of :meth:`cross`, to the hidden state and, if it
        ``projects``, to logits. Rows are those of one utterance after those
        of another."""
        heads, size = self._heads, self._size
        x = hidden = op.parameter([-1, -1, heads * size], np.float32, "hidden")
        rows = op.parameter([-1], np.int32, "rows")
        mask = op.parameter([1, 1, -1, -1], np.float32, "mask")
        inputs, sinks = [hidden, rows, mask], []
        for i, block in enumerate(self._decoder.layers):
            path = f"layers.{i}."
            y = self._builder.norm(x, block.self_attn_layer_norm)
            y, kept = self._attend_past(y, f"{path}self_attn", rows, mask)
            x, sinks = op.add(x, y), sinks + kept
            shapes = [-1, heads, size, -1], [-1, heads, -1, size]
            given = [
                op.parameter(shape, np.float32, f"{name}{i}")
                for shape, name in zip(shapes, ("keys", "values"), strict=True)
            ]
            inputs += given
            y = self._builder.norm(x, block.encoder_attn_layer_norm)
            x = op.add(x, self._attend(y, f"{path}encoder_attn", *given))
            y = self._builder.norm(x, block.final_layer_norm)
            y = op.gelu(self._linear(y, f"{path}fc1"), "erf")
            x = op.add(x, self._linear(y, f"{path}fc2"))
        x = self._builder.norm(x, self._decoder.layer_norm)
        results = [op.result(x)]
        if self.projects:
            results.append(op.result(self._linear(x, PROJECTION)))
        return name_by_place(ov.Model(results, sinks, inputs, "step"))

    def _linear(self, x: ov.Node, path: str) -> ov.Node:
        layer = self._layer(path)
        weight = self._builder.weight(layer)
        y = op.matmul(_on_grid(x, layer), weight, False, True)
        return y if layer.bias is None else op.add(y, _f32(layer.bias))

    def _query(self, x: ov.Node, path: str) -> ov.Node:
        scaling = self._decoder.get_submodule(path).scaling
        return op.multiply(self._linear(x, f"{path}.q_proj"), _f32(scaling))

    def _split(self, y: ov.Node, order: tuple[int, ...]) -> ov.Node:
        y = op.reshape(y, _i64(0, 0, self._heads, self._size), True)
        return op.transpose(y, _i64(*order))

    def _attend_past(
        self, x: ov.Node, path: str, rows: ov.Node, mask: ov.Node
    ) -> tuple[ov.Node, list[ov.Node]]:
        """Attention to the tokens so far, and the assignments of its state.
        OpenVINO fuses these operations into one that reorders nothing."""
        order = 0, 2, 1, 3
        query = self._split(self._query(x, path), order)
        found, sinks = [], []
        for name in ("k_proj", "v_proj"):
            y = self._split(self._linear(x, f"{path}.{name}"), order)
            info = VariableInfo()
            info.data_shape = ov.PartialShape([-1, self._heads, -1, self._size])
            info.data_type = ov.Type.f32
            info.variable_id = f"{path}.{name}"
            variable = Variable(info)
            count = op.gather(op.shape_of(x), _i64(0), _i64(0))
            shape = op.concat([count, _i64(self._heads, 0, self._size)], 0)
            past = opset6.read_value(op.broadcast(_f32(0.0), shape), variable)
            y = op.concat([op.gather(past, rows, _i64(0)), y], 2)
            sinks.append(op.assign(y, variable))
            found.append(y)
        y = op.scaled_dot_product_attention(
            query, *found, mask, _f32(1.0), causal=False
        )
        y = op.transpose(y, _i64(*order))
        y = op.reshape(y, _i64(0, 0, self._heads * self._size), True)
        return self._linear(y, f"{path}.out_proj"), sinks

    def _attend(
        self, x: ov.Node, path: str, keys: ov.Node, values: ov.Node
    ) -> ov.Node:
        """Attention of all rows of an utterance to its states."""
        query = self._query(x, path)
        count = op.gather(op.shape_of(keys), _i64(0), _i64(0))
        shape = op.concat([count, _i64(-1, self._heads, self._size)], 0)
        query = op.transpose(op.reshape(query, shape, False), _i64(0, 2, 1, 3))
        scores = op.softmax(op.matmul(query, keys, False, False), -1)
        y = op.transpose(
            op.matmul(scores, values, False, False), _i64(0, 2, 1, 3)
        )
        y = op.reshape(y, op.shape_of(x), False)
        return self._linear(y, f"{path}.out_proj")


def _on_grid(x: ov.Node, layer: AnyLayer) -> ov.Node:
    """A layer's input, rounded to the plan's grid, in floats: a FakeQuantize
    would be multiplied in integers."""
    if not isinstance(layer, IntegerLayer):
        return x
    scale, offset = layer.activation_scale, layer.activation_offset
    edge = float(qmax(layer.activation_bits))
    if offset:
        x = op.subtract(x, _f32(offset))
    x = op.round(op.multiply(x, _f32(1.0 / scale)), "half_to_even")
    x = op.multiply(op.clamp(x, -edge, edge), _f32(scale))
    return op.add(x, _f32(offset)) if offset else x
