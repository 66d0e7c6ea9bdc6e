"""An encoder as an OpenVINO graph with int8 constants.

The graph is built from the description, operation by operation, rather than
traced: the weights enter as the bytes that they are (constant -> convert ->
scale, which OpenVINO executes as int8), so that no float copy of them exists
at any time. Layer inputs pass a FakeQuantize on the plan's scale.
"""

import math

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op

from ...integer import FloatLayer, IntegerLayer
from ...numerics import qmax
from ..encoder import AnyLayer, BlockSpec, EncoderSpec, Norm

#: Added to the scores of padded keys; exp of it is 0 also in bfloat16.
MASKED = 1e4

#: GELU is nowhere below this.
GELU_MINIMUM = -0.17

#: Added to integers so that none is negative: oneDNN multiplies unsigned by
#: signed bytes, and takes longer for signed inputs.
ZERO_POINT = 128


def _f32(value: torch.Tensor | float) -> ov.Node:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return op.constant(np.asarray(value, dtype=np.float32))


def _i64(*values: int) -> ov.Node:
    return op.constant(np.asarray(values, dtype=np.int64))


def _named(model: ov.Model) -> ov.Model:
    """Names operations by their place: OpenVINO counts them through a whole
    process, and finds a compiled graph again by these names too."""
    for place, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() != "Parameter":
            node.set_friendly_name(f"{node.get_type_name()}_{place}")
    return model


class GraphBuilder:
    """Builds the graph of one encoder.

    Inputs: ``wave`` [batch, 1, samples]; ``keep`` [batch, frames, 1], 1 at
    real frames and 0 at padded ones; ``gain`` and ``shift`` [batch, channels,
    1] in place of a GroupNorm over time. Output: ``hidden`` [batch, frames,
    channels].

    Arguments
    ---------
    spec : EncoderSpec
        The encoder.
    batch, samples : int
        Of the input; -1 for any.
    """

    def __init__(self, spec: EncoderSpec, batch: int, samples: int):
        self.spec = spec
        self.batch = batch
        self.samples = samples
        self.inputs: list[ov.Node] = []
        # Layers that share an input with one scale share its integers.
        self._quantized: dict[tuple, ov.Node] = {}
        self._alive: list[ov.Node] = []

    def input(self, name: str, shape: list[int]) -> ov.Node:
        """A float32 input of the graph."""
        node = op.parameter(shape, np.float32)
        node.set_friendly_name(name)
        node.output(0).set_names({name})
        self.inputs.append(node)
        return node

    def quantize(
        self, x: ov.Node, layer: IntegerLayer, least: float = -math.inf
    ) -> ov.Node:
        """The input of a layer on the plan's grid, which OpenVINO knows in
        its width of 8 bits only: 256 levels.

        Arguments
        ---------
        x : openvino.Node
            The input.
        layer : IntegerLayer
            The layer.
        least : float
            Lower bound of ``x``.

        Returns
        -------
        openvino.Node
            The values on the grid plus ``ZERO_POINT`` scales, less the
            offset.
        """
        scale, bits = float(layer.activation_scale), layer.activation_bits
        offset = -layer.zero_point() * scale
        key = (id(x), scale, bits, offset)
        if key not in self._quantized:
            node, edge = x, qmax(bits) * scale
            top = qmax(8) * scale + offset
            low, high = _f32(top - 255 * scale), _f32(top)
            # 256 levels are one too many, at the lower end.
            if bits < 8 or least < offset - edge - scale / 2:
                node = op.clamp(x, offset - edge, offset + edge)
            zero, last = _f32(0.0), _f32(255 * scale)
            node = op.fake_quantize(node, low, high, zero, last, 256)
            self._quantized[key] = node
            self._alive.append(x)  # its id stays its own
        return self._quantized[key]

    @staticmethod
    def weight(layer: AnyLayer, gain: float = 1.0) -> ov.Node:
        """The weight of a layer, grouped if its convolution is. The operation
        keeps the integers that it shares."""
        shape = tuple(layer.weight.shape)
        if layer.groups > 1:
            shape = (layer.groups, shape[0] // layer.groups, *shape[1:])
        weight = layer.weight.reshape(shape)
        if isinstance(layer, FloatLayer):
            return _f32(weight * gain)
        lead = 2 if layer.groups > 1 else 1
        scale = layer.weight_scale.reshape(
            (*shape[:lead], *[1] * (len(shape) - lead))
        )
        # Shared, not copied: compiling makes a packed copy anyway.
        integers = op.constant(
            weight.contiguous().cpu().numpy(), shared_memory=True
        )
        return op.multiply(op.convert(integers, "f32"), _f32(scale * gain))

    @staticmethod
    def bias(layer: AnyLayer, gain: float = 1.0) -> torch.Tensor | None:
        """What is added to the product: of integers less the share that the
        zero point has in it."""
        bias = None if layer.bias is None else layer.bias.double()
        if isinstance(layer, IntegerLayer):
            # By numpy: torch would make a copy of the weight in 64 bits.
            rows = layer.weight.flatten(1).cpu().numpy()
            sums = torch.from_numpy(rows.sum(1, dtype=np.int64)).double()
            scale = layer.activation_scale.double() * layer.weight_scale
            share = (ZERO_POINT + layer.zero_point()) * scale * sums
            bias = -share if bias is None else bias - share
        return None if bias is None else (bias * gain).float()

    def linear(
        self,
        x: ov.Node,
        layer: AnyLayer,
        gain: float = 1.0,
        least: float = -math.inf,
    ) -> ov.Node:
        """[..., in] to [..., out], times a constant."""
        layer = layer.loaded()
        if isinstance(layer, IntegerLayer):
            x = self.quantize(x, layer, least)
        y = op.matmul(x, self.weight(layer, gain), False, True)
        bias = self.bias(layer, gain)
        return y if bias is None else op.add(y, _f32(bias))

    def conv(
        self, x: ov.Node, layer: AnyLayer, least: float = -math.inf
    ) -> ov.Node:
        """[batch, in, time] to [batch, out, time]."""
        layer = layer.loaded()
        if layer.padding:
            # Padded before it is quantized: zeros are at the zero point, and
            # the convolution of a margin of its own is 1.7 times as slow.
            margin = _i64(0, 0, layer.padding)
            x = op.pad(x, margin, margin, "constant", _f32(0.0))
        if isinstance(layer, IntegerLayer):
            x = self.quantize(x, layer, least)
        make = op.convolution if layer.groups == 1 else op.group_convolution
        stride, dilation = [layer.stride], [layer.dilation]
        y = make(x, self.weight(layer), stride, [0], [0], dilation)
        bias = self.bias(layer)
        return y if bias is None else op.add(y, _f32(bias.reshape(1, -1, 1)))

    @staticmethod
    def norm(x: ov.Node, norm: Norm) -> ov.Node:
        """LayerNorm over the last axis."""
        y = op.mvn(x, _i64(-1), True, norm.eps, "inside_sqrt")
        return op.add(op.multiply(y, _f32(norm.weight)), _f32(norm.bias))

    @staticmethod
    def gelu(x: ov.Node) -> ov.Node:
        """The exact one."""
        return op.gelu(x, "erf")

    @staticmethod
    def turn(x: ov.Node) -> ov.Node:
        """[batch, a, b] to [batch, b, a]."""
        return op.transpose(x, _i64(0, 2, 1))

    def attend(self, block: BlockSpec, x: ov.Node, mask: ov.Node) -> ov.Node:
        """Self-attention before its output projection."""
        heads = self.spec.num_heads
        width = block.query.weight.shape[0] // heads

        def split(y: ov.Node) -> ov.Node:
            y = op.reshape(y, _i64(0, 0, heads, width), True)
            return op.transpose(y, _i64(0, 2, 1, 3))

        # The 1/sqrt(width) of the scores is in the query's scales.
        query = split(self.linear(x, block.query, width**-0.5))
        key = split(self.linear(x, block.key))
        value = split(self.linear(x, block.value))
        scores = op.add(op.matmul(query, key, False, True), mask)
        out = op.matmul(op.softmax(scores, -1), value, False, False)
        out = op.transpose(out, _i64(0, 2, 1, 3))
        return op.reshape(out, _i64(0, 0, heads * width), True)

    def block(self, block: BlockSpec, x: ov.Node, mask: ov.Node) -> ov.Node:
        """One transformer block."""
        pre = self.spec.pre_norm
        y = self.norm(x, block.norm1) if pre else x
        y = self.linear(self.attend(block, y, mask), block.out)
        x = op.add(x, y)
        if not pre:
            x = self.norm(x, block.norm1)
        y = self.norm(x, block.norm2) if pre else x
        y = self.gelu(self.linear(y, block.up))
        y = self.linear(y, block.down, least=GELU_MINIMUM)
        x = op.add(x, y)
        return x if pre else self.norm(x, block.norm2)

    def features(self, x: ov.Node) -> ov.Node:
        """The convolutions: [batch, 1, samples] to [batch, frames, C]."""
        least = -math.inf
        for stage in self.spec.convs:
            x = self.conv(x, stage.conv, least)
            if stage.norm is None:
                x = self.gelu(x)
            elif stage.norm.over_time:
                shape = [self.batch, stage.conv.weight.shape[0], 1]
                gain = self.input("gain", shape)
                shift = self.input("shift", shape)
                x = self.gelu(op.add(op.multiply(x, gain), shift))
            else:
                y = self.norm(self.turn(x), stage.norm)
                x = self.turn(self.gelu(y))
            least = GELU_MINIMUM
        return self.turn(x)

    def build(self) -> ov.Model:
        """The whole graph.

        Returns
        -------
        openvino.Model
        """
        spec = self.spec
        frames = -1 if self.samples < 0 else spec.frames(self.samples)
        wave = self.input("wave", [self.batch, 1, self.samples])
        keep = self.input("keep", [self.batch, frames, 1])
        x = self.features(wave)
        least = -math.inf
        if spec.projection_norm is not None:
            x = self.norm(x, spec.projection_norm)
        else:
            least = GELU_MINIMUM
        x = op.multiply(self.linear(x, spec.projection, least=least), keep)
        position = self.conv(self.turn(x), spec.pos_conv)
        if spec.pos_trim:
            position = op.slice(
                position, _i64(0), _i64(-spec.pos_trim), _i64(1), _i64(2)
            )
        x = op.add(x, self.turn(self.gelu(position)))
        if not spec.pre_norm:
            x = self.norm(x, spec.norm)
        # Computed from `keep` rather than an input of its own: a float32
        # input to the fused attention is misread in bfloat16 (2026.4).
        mask = op.multiply(op.subtract(keep, _f32(1.0)), _f32(MASKED))
        mask = op.unsqueeze(self.turn(mask), _i64(1))
        if spec.rotation is not None:
            x = op.matmul(x, _f32(spec.rotation), False, True)
        for block in spec.blocks:
            x = self.block(block, x, mask)
        if spec.rotation is not None:
            x = op.matmul(x, _f32(spec.rotation), False, False)
        if spec.pre_norm:
            x = self.norm(x, spec.norm)
        x.output(0).set_names({"hidden"})
        return _named(ov.Model([op.result(x)], self.inputs, "encoder"))
