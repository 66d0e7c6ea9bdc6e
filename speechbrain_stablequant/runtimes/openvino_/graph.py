"""An encoder as an OpenVINO graph with int8 constants.

The graph is built from the description, not traced: weights enter as their
bytes (constant -> convert -> scale, which OpenVINO executes as int8), so that
no float copy ever exists. Layer inputs pass a FakeQuantize with the plan's
scale.
"""

import math
from dataclasses import replace

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op

from ...core.affine import GELU_MIN, qmax
from ...core.encoder_spec import BlockSpec, ConvSpec, EncoderSpec, Norm
from ...core.integer_layer import AnyLayer, FloatLayer, IntegerLayer
from ..algorithms import check_front, join_groups, split_groups, window_rows
from ..geometry import CONVOLUTION, FLOAT, JOINED_GROUPS, WINDOW_PRODUCT
from .core import name_by_place

#: Added to the scores of padded keys; exp of it is 0 also in bfloat16.
MASKED = 1e4

#: Added to integers so that none is negative: oneDNN multiplies unsigned by
#: signed bytes, and takes longer for signed inputs.
ZERO_POINT = 128


def _f32(value: torch.Tensor | float) -> ov.Node:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return op.constant(np.asarray(value, dtype=np.float32))


def _i64(*values: int) -> ov.Node:
    return op.constant(np.asarray(values, dtype=np.int64))


def _as_floats(layer: AnyLayer) -> bool:
    """Whether integers are multiplied as floats."""
    return isinstance(layer, IntegerLayer) and layer.algorithm == FLOAT


def flat_windows(layer: AnyLayer) -> AnyLayer:
    """A convolution as a product with flattened windows."""
    rows = window_rows(layer.weight)
    return replace(layer, kind="linear", weight=rows, groups=1)


def channels_first(spec: EncoderSpec) -> bool:
    """Whether the feature extractor computes [batch, channels, time]: its
    convolutions by those of the library, without a transposition between."""
    return all(
        stage.conv.algorithm == CONVOLUTION
        and (stage.norm is None or stage.norm.over_time)
        for stage in spec.convs
    )


class GraphBuilder:
    """Builds the graph of one encoder.

    Inputs: ``windows`` [batch, windows, kernel] of the first convolution;
    ``keep`` [batch, frames, 1], 1 at real and 0 at padded
    frames; ``gain`` and ``shift`` [batch, 1, channels] in place of a GroupNorm
    over time. If :func:`channels_first`, the last two axes of all but ``keep``
    are exchanged. Output: ``hidden`` [batch, frames, channels], bfloat16 if
    ``half``: with a float32 output OpenVINO keeps the whole residual stream in
    float32 and converts it for each layer.
    """

    def __init__(self, spec: EncoderSpec, half: bool = False):
        self.spec = spec
        self.half = half
        self.inputs: list[ov.Node] = []
        # Layers that share an input with one scale share its integers. With
        # the input, so that its id stays its own.
        self._quantized: dict[tuple, tuple[ov.Node, ov.Node]] = {}

    def input(self, name: str, shape: list[int]) -> ov.Node:
        """A float32 input of the graph."""
        node = op.parameter(shape, np.float32, name)
        node.output(0).set_names({name})
        self.inputs.append(node)
        return node

    def quantize(
        self, x: ov.Node, layer: AnyLayer, least: float = -math.inf
    ) -> ov.Node:
        """A layer's input. If the layer is quantized, it is rounded to the
        plan's grid and shifted by ``ZERO_POINT`` scales minus the zero point.
        OpenVINO knows 256 levels only. Integers that are multiplied as floats
        stay integers, which bfloat16 holds exactly. ``least``: known lower
        bound of ``x``."""
        if isinstance(layer, FloatLayer):
            return x
        scale, bits = float(layer.activation_scale), layer.activation_bits
        offset = -layer.zero_point() * scale
        floats = _as_floats(layer)
        key = (id(x), scale, bits, offset, floats)
        if key not in self._quantized:
            node, edge = x, qmax(bits) * scale
            top = qmax(8) * scale + offset
            low, high = _f32(top - 255 * scale), _f32(top)
            # 256 levels are one too many, at the lower end.
            if bits < 8 or least < offset - edge - scale / 2:
                node = op.clamp(x, offset - edge, offset + edge)
            zero, last = _f32(0.0), _f32(255 * scale)
            if floats:
                lowest = -ZERO_POINT - layer.zero_point()
                zero, last = _f32(lowest), _f32(lowest + 255)
            node = op.fake_quantize(node, low, high, zero, last, 256)
            self._quantized[key] = node, x
        return self._quantized[key][0]

    @staticmethod
    def weight(layer: AnyLayer, gain: float = 1.0) -> ov.Node:
        """A layer's weight, grouped if its convolution is. The constant
        keeps the integers that it shares alive."""

        def grouped(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(0, (layer.groups, -1)) if layer.groups > 1 else x

        weight = grouped(layer.weight)
        if isinstance(layer, FloatLayer):
            return _f32(weight * gain)
        if _as_floats(layer):
            return _f32(weight)
        ones = [1] * (layer.weight.dim() - 1)
        scale = grouped(layer.weight_scale.view(-1, *ones))
        # Shared, not copied: compiling makes a packed copy anyway.
        rows = weight.contiguous().cpu().numpy()
        integers = op.constant(rows, shared_memory=True)
        return op.multiply(op.convert(integers, "f32"), _f32(scale * gain))

    @staticmethod
    def bias(layer: AnyLayer, gain: float = 1.0) -> torch.Tensor | None:
        """The bias, less the zero point's share of the integer sums."""
        bias = None if layer.bias is None else layer.bias.double()
        if isinstance(layer, IntegerLayer) and not _as_floats(layer):
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
        """A Linear, [..., in] to [..., out], times ``gain``."""
        return self.product(self.quantize(x, layer, least), layer, gain)

    def product(
        self, x: ov.Node, layer: AnyLayer, gain: float = 1.0
    ) -> ov.Node:
        """The product of a linear layer with its quantized input."""
        layer = layer.loaded()
        y = op.matmul(x, self.weight(layer, gain), False, True)
        return self.finish(y, layer, (-1,), gain)

    def finish(
        self, y: ov.Node, layer: AnyLayer, shape: tuple, gain: float = 1.0
    ) -> ov.Node:
        """Apply the scale, if the weight has none, and the bias after a
        product, both reshaped to ``shape``."""
        if _as_floats(layer):
            scale = layer.activation_scale * layer.weight_scale * gain
            y = op.multiply(y, _f32(scale.reshape(shape)))
        bias = self.bias(layer, gain)
        return y if bias is None else op.add(y, _f32(bias.reshape(shape)))

    def conv(
        self, x: ov.Node, layer: AnyLayer, least: float = -math.inf
    ) -> ov.Node:
        """A convolution, [batch, in, *sizes] to [batch, out, *sizes]."""
        layer = layer.loaded()
        axes = layer.weight.dim() - 2
        if axes == 1 and layer.algorithm in (JOINED_GROUPS, FLOAT):
            layer = join_groups(layer)
        padding, stride, dilation = (
            size if isinstance(size, tuple) else (size,)
            for size in (layer.padding, layer.stride, layer.dilation)
        )
        if any(padding):
            # Padded before it is quantized, so that zeros become the zero
            # point. The convolution's own padding is 1.7 times as slow.
            margin = _i64(0, 0, *padding)
            x = op.pad(x, margin, margin, "constant", _f32(0.0))
        x = self.quantize(x, layer, least)
        if layer.algorithm == WINDOW_PRODUCT:
            return self.turn(self.window_product(self.turn(x), layer))
        make = op.convolution if layer.groups == 1 else op.group_convolution
        none = [0] * axes
        y = make(x, self.weight(layer), stride, none, none, dilation)
        return self.finish(y, layer, (1, -1, *[1] * axes))

    def window_product(self, x: ov.Node, layer: AnyLayer) -> ov.Node:
        """A convolution as one product per group: padded and quantized
        [batch, time, in] to [batch, time, out]."""
        kernel = layer.weight.shape[2]
        reach = (kernel - 1) * layer.dilation
        time = op.gather(op.shape_of(x), _i64(1), _i64(0))
        count = op.subtract(op.squeeze(time, _i64(0)), _i64(reach))
        first, step = (op.constant(np.int64(x)) for x in (0, layer.stride))
        starts = op.range(first, op.squeeze(count, _i64(0)), step, "i64")
        taps = op.constant(np.arange(kernel, dtype=np.int64) * layer.dilation)
        index = op.add(op.unsqueeze(starts, _i64(1)), taps)
        parts = [x]
        if layer.groups > 1:
            parts = op.split(x, 2, layer.groups).outputs()
        outs = []
        for part, group in zip(parts, split_groups(layer), strict=True):
            # [batch, time, kernel, in] of the group.
            windows = op.gather(part, index, _i64(1))
            windows = op.reshape(windows, _i64(0, 0, -1), True)
            outs.append(self.product(windows, flat_windows(group)))
        return outs[0] if len(outs) == 1 else op.concat(outs, 2)

    def first(
        self, windows: ov.Node, layer: AnyLayer, turned: bool = False
    ) -> ov.Node:
        """The first convolution, [batch, windows, kernel] to [batch, windows,
        out]; ``turned``: [batch, kernel, windows] to [batch, out, windows],
        by a convolution."""
        layer = flat_windows(layer.loaded())
        if layer.algorithm != CONVOLUTION:
            return self.linear(windows, layer)
        layer = replace(layer, weight=layer.weight[..., None], stride=1)
        if turned:
            return self.conv(windows, layer)
        return self.turn(self.conv(self.turn(windows), layer))

    def strided(
        self, x: ov.Node, layer: AnyLayer, least: float = -math.inf
    ) -> ov.Node:
        """A convolution of the feature extractor, [batch, time, in] to
        [batch, time, out]."""
        if layer.algorithm == CONVOLUTION:
            return self.turn(self.conv(self.turn(x), layer, least))
        # With a dynamic length OpenVINO would really transpose, which takes
        # as long as the convolution; so windows are multiplied.
        x = self.quantize(x, layer, least)
        return self.window_product(x, layer.loaded())

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
        """Self-attention."""
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
        # Within the fused attention, before the heads are put together.
        out = self.quantize(out, block.out)
        out = op.transpose(out, _i64(0, 2, 1, 3))
        out = op.reshape(out, _i64(0, 0, heads * width), True)
        return self.product(out, block.out)

    def block(self, block: BlockSpec, x: ov.Node, mask: ov.Node) -> ov.Node:
        """One transformer block."""
        pre = self.spec.pre_norm
        y = self.norm(x, block.norm1) if pre else x
        x = op.add(x, self.attend(block, y, mask))
        if not pre:
            x = self.norm(x, block.norm1)
        y = self.norm(x, block.norm2) if pre else x
        y = op.gelu(self.linear(y, block.up), "erf")
        x = op.add(x, self.linear(y, block.down, least=GELU_MIN))
        return x if pre else self.norm(x, block.norm2)

    def features(self, windows: ov.Node) -> ov.Node:
        """The convolutions: [batch, windows, kernel] to [batch, frames, C]."""
        first, *others = self.spec.convs
        turned = channels_first(self.spec)
        compute = self.conv if turned else self.strided
        x = self.first(windows, first.conv, turned)
        x = self.activate(x, first, turned)
        for stage in others:
            x = self.activate(compute(x, stage.conv, GELU_MIN), stage, turned)
        return self.turn(x) if turned else x

    def activate(self, x: ov.Node, stage: ConvSpec, turned: bool) -> ov.Node:
        """The norm and GELU after a convolution of the feature extractor;
        ``turned``: of [batch, channels, time]."""
        if stage.norm is not None and stage.norm.over_time:
            width = stage.conv.weight.shape[0]
            shape = [-1, width, 1] if turned else [-1, 1, width]
            gain, shift = (
                self.input(name, shape) for name in ("gain", "shift")
            )
            x = op.add(op.multiply(x, gain), shift)
        elif stage.norm is not None:
            x = self.norm(x, stage.norm)
        return op.gelu(x, "erf")

    def build(self) -> ov.Model:
        """The whole graph, for any batch size and length."""
        spec = self.spec
        for stage in spec.convs:
            check_front(stage.conv)
        kernel = spec.convs[0].conv.weight.shape[2]
        shape = [-1, kernel, -1] if channels_first(spec) else [-1, -1, kernel]
        windows = self.input("windows", shape)
        keep = self.input("keep", [-1, -1, 1])
        x = self.features(windows)
        least = GELU_MIN
        if spec.projection_norm is not None:
            x, least = self.norm(x, spec.projection_norm), -math.inf
        x = op.multiply(self.linear(x, spec.projection, least=least), keep)
        position = self.conv(self.turn(x), spec.pos_conv)
        if spec.pos_trim:
            end = _i64(-spec.pos_trim)
            position = op.slice(position, _i64(0), end, _i64(1), _i64(2))
        x = op.add(x, self.turn(op.gelu(position, "erf")))
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
        return self.model(x, "encoder")

    def model(self, x: ov.Node, name: str) -> ov.Model:
        """The graph whose output ``hidden`` is ``x``."""
        if self.half:
            x = op.convert(x, "bf16")
        x.output(0).set_names({"hidden"})
        return name_by_place(ov.Model([op.result(x)], self.inputs, name))
