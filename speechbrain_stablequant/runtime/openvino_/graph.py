"""An encoder as an OpenVINO graph with int8 constants.

The graph is built from the description, operation by operation, rather than
traced: the weights enter as the bytes that they are (constant -> convert ->
scale, which OpenVINO executes as int8), so that no float copy of them exists
at any time. Layer inputs pass a FakeQuantize on the plan's scale.
"""

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op

from ...integer import FloatLayer, IntegerLayer
from ...numerics import qmax
from ..encoder import AnyLayer, BlockSpec, EncoderSpec, Norm

#: Added to the scores of padded keys; exp of it is 0 also in bfloat16.
MASKED = 1e4
VAR = 1


def _f32(value: torch.Tensor | float) -> ov.Node:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return op.constant(np.asarray(value, dtype=np.float32))


def _i64(*values: int) -> ov.Node:
    return op.constant(np.asarray(values, dtype=np.int64))


def _in_compute_precision(node: ov.Node) -> ov.Node:
    """Marks a node to be computed in the precision of the rest.

    OpenVINO keeps all that lies between the output and the last product in
    float32, to the accuracy's benefit; through the residual additions that is
    the whole encoder, and each addition then converts forth and back.
    """
    node.set_rt_info(True, "enforceBF16evenForGraphTail")
    return node


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
        # Layers that share an input with one scale share its integers.
        self._quantized: dict[tuple[int, float, int], ov.Node] = {}
        self._alive: list[ov.Node] = []

    def quantize(self, x: ov.Node, layer: AnyLayer) -> ov.Node:
        """The input of a layer on the plan's grid."""
        if isinstance(layer, FloatLayer):
            return x
        scale, bits = float(layer.activation_scale), layer.activation_bits
        key = (id(x), scale, bits)
        if key not in self._quantized:
            edge = qmax(bits) * scale
            if VAR == 1 and layer.kind == "linear" and bits == 8:
                low, high = _f32(-edge), _f32(edge)
                node = op.fake_quantize(x, low, high, low, high, 255)
            else:
                low, high = _f32(-128 * scale), _f32(127 * scale)
                node = op.fake_quantize(
                    op.clamp(x, -edge, edge) if VAR != 2 else x,
                    low,
                    high,
                    low,
                    high,
                    256,
                )
            if VAR == 5 and layer.kind == "linear":
                node = op.fake_quantize(
                    op.clamp(x, -edge, edge),
                    low,
                    high,
                    _f32(0),
                    _f32(255 * scale),
                    256,
                )
            self._quantized[key] = node
            self._alive.append(x)  # its id stays its own
        return self._quantized[key]

    @staticmethod
    def weight(layer: AnyLayer, gain: float = 1.0) -> ov.Node:
        """The weight of a layer, grouped if its convolution is."""
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
        integers = op.constant(weight.contiguous().cpu().numpy())
        return op.multiply(op.convert(integers, "f32"), _f32(scale * gain))

    def linear(self, x: ov.Node, layer: AnyLayer, gain: float = 1.0) -> ov.Node:
        """[..., in] to [..., out], times a constant."""
        y = op.matmul(
            self.quantize(x, layer), self.weight(layer, gain), False, True
        )
        bias = layer.bias
        if VAR == 5:
            shift = (
                layer.weight.sum(1, dtype=torch.int64)
                * layer.weight_scale
                * layer.activation_scale
                * 128
            )
            bias = bias - shift
        if layer.bias is not None:
            y = op.add(y, _f32(bias * gain))
        return y

    def conv(self, x: ov.Node, layer: AnyLayer) -> ov.Node:
        """[batch, in, time] to [batch, out, time]."""
        make = op.convolution if layer.groups == 1 else op.group_convolution
        pads = [layer.padding]
        y = make(
            self.quantize(x, layer),
            self.weight(layer),
            [layer.stride],
            pads,
            pads,
            [layer.dilation],
        )
        if layer.bias is not None:
            y = op.add(y, _f32(layer.bias.reshape(1, -1, 1)))
        return y

    @staticmethod
    def norm(x: ov.Node, norm: Norm) -> ov.Node:
        """LayerNorm over the last axis."""
        y = op.mvn(x, _i64(-1), True, norm.eps, "inside_sqrt")
        return op.add(op.multiply(y, _f32(norm.weight)), _f32(norm.bias))

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
        x = _in_compute_precision(op.add(x, y))
        if not pre:
            x = self.norm(x, block.norm1)
        y = self.norm(x, block.norm2) if pre else x
        y = op.gelu(self.linear(y, block.up), "tanh" if VAR == 4 else "erf")
        x = _in_compute_precision(op.add(x, self.linear(y, block.down)))
        return x if pre else self.norm(x, block.norm2)

    def features(self, x: ov.Node, inputs: list[ov.Node]) -> ov.Node:
        """The convolutions: [batch, 1, samples] to [batch, frames, C]."""
        for stage in self.spec.convs:
            x = self.conv(x, stage.conv)
            if stage.norm is None:
                x = op.gelu(x, "tanh" if VAR == 4 else "erf")
            elif stage.norm.over_time:
                shape = [self.batch, stage.conv.weight.shape[0], 1]
                gain = op.parameter(shape, np.float32, "gain")
                shift = op.parameter(shape, np.float32, "shift")
                inputs += [gain, shift]
                x = op.gelu(
                    op.add(op.multiply(x, gain), shift),
                    "tanh" if VAR == 4 else "erf",
                )
            else:
                y = self.norm(self.turn(x), stage.norm)
                x = self.turn(op.gelu(y, "tanh" if VAR == 4 else "erf"))
        return self.turn(x)

    def build(self) -> ov.Model:
        """The whole graph.

        Returns
        -------
        openvino.Model
        """
        spec = self.spec
        frames = -1 if self.samples < 0 else spec.frames(self.samples)
        wave = op.parameter([self.batch, 1, self.samples], np.float32, "wave")
        keep = op.parameter([self.batch, frames, 1], np.float32, "keep")
        inputs = [wave, keep]
        x = self.features(wave, inputs)
        if spec.projection_norm is not None:
            x = self.norm(x, spec.projection_norm)
        x = op.multiply(self.linear(x, spec.projection), keep)
        position = self.conv(self.turn(x), spec.pos_conv)
        if spec.pos_trim:
            position = op.slice(
                position, _i64(0), _i64(-spec.pos_trim), _i64(1), _i64(2)
            )
        x = op.add(
            x, self.turn(op.gelu(position, "tanh" if VAR == 4 else "erf"))
        )
        if not spec.pre_norm:
            x = self.norm(x, spec.norm)
        # Computed from `keep` rather than an input of its own: a float32
        # input to the fused attention is misread in bfloat16 (2026.4).
        if VAR == 3:
            mask = op.parameter(
                [self.batch, 1, 1, frames], ov.Type.bf16, "mask"
            )
            inputs.append(mask)
            mask = op.convert(mask, "f32")
        else:
            mask = op.multiply(op.subtract(keep, _f32(1.0)), _f32(MASKED))
            mask = op.unsqueeze(self.turn(mask), _i64(1))
        for block in spec.blocks:
            x = self.block(block, x, mask)
        if spec.pre_norm:
            x = self.norm(x, spec.norm)
        return ov.Model([op.result(x, "hidden")], inputs, "encoder")
