"""Builds the ONNX nodes of an encoder from its description."""

import numpy as np
import torch

from ...core.affine import GELU_MIN
from ...core.encoder_spec import AnyLayer, BlockSpec, EncoderSpec
from ...core.integer_layer import FloatLayer
from ..algorithms import CONVOLUTION
from .graph import Graph

# Added to the attention scores of padded frames: exp() of it is 0, and a row
# of nothing but padding stays finite.
MASKED = -1e30


def _frames_of(graph: Graph, samples: str, layer: AnyLayer) -> str:
    """max((samples - kernel) // stride + 1, 0) on int64. ONNX division
    rounds toward zero, so its operand is kept nonnegative."""
    shift = layer.stride - layer.weight.shape[-1]
    moved = graph.add("Add", [samples, graph.constant([shift])])
    safe = graph.add("Max", [moved, graph.constant([0])])
    return graph.add("Div", [safe, graph.constant([layer.stride])])


def unfold(graph: Graph, q: str, layer: AnyLayer) -> str:
    """[batch, time, channels] to [batch, frames, kernel * channels]. Whole
    strides are a reshape; only what a kernel has beyond them is copied."""
    channels, kernel = layer.weight.shape[1:]
    stride = layer.stride
    frames = _frames_of(graph, graph.size(q, 1), layer)
    span = graph.add("Mul", [frames, graph.constant([stride])])

    def part(start: int, step: int) -> str:
        first = graph.constant([start])
        end = graph.add("Add", [span, first]) if start else span
        return graph.slice(q, first, end, 1, step)

    whole = kernel // stride
    parts = [
        graph.reshape(part(i * stride, 1), 0, -1, stride * channels)
        for i in range(whole)
    ]
    # A slice with a step has one row a frame.
    parts += [part(i, stride) for i in range(whole * stride, kernel)]
    return parts[0] if len(parts) == 1 else graph.add("Concat", parts, axis=-1)


def tap_major(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, kernel] to [kernel * in, out], as :func:`unfold` needs."""
    return weight.permute(2, 1, 0).reshape(-1, weight.shape[0])


def conv_as_product(
    graph: Graph, x: str, layer: AnyLayer, lowest: float = -float("inf")
) -> str:
    """A convolution of the feature extractor on [batch, time, channels]."""
    if layer.algorithm == CONVOLUTION:
        q = graph.quantize(graph.transpose(x, 0, 2, 1), layer, lowest)
        return graph.transpose(graph.convolution(q, layer), 0, 2, 1)
    q = unfold(graph, graph.quantize(x, layer, lowest), layer)
    return graph.product(q, layer, tap_major(layer.weight))


def _convs_as_products(graph: Graph, spec: EncoderSpec, wave: str) -> str:
    """The feature extractor on [batch, time, channels]."""
    x = graph.add("Unsqueeze", [wave, graph.constant([2])])
    lowest = -float("inf")
    for stage in spec.convs:
        x = conv_as_product(graph, x, stage.conv, lowest)
        if stage.norm is not None and stage.norm.over_time:
            x = graph.norm(graph.transpose(x, 0, 2, 1), stage.norm)
            x = graph.transpose(x, 0, 2, 1)
        else:
            x = graph.norm(x, stage.norm)
        x = graph.add("Gelu", [x])
        lowest = GELU_MIN
    return x


def _convs_as_convs(graph: Graph, spec: EncoderSpec, wave: str) -> str:
    """The feature extractor with Conv nodes, on [batch, channels, time]."""
    x = graph.add("Unsqueeze", [wave, graph.constant([1])])
    lowest = -float("inf")
    for stage in spec.convs:
        q = graph.quantize(x, stage.conv, lowest)
        x = graph.convolution(q, stage.conv)
        if stage.norm is not None and not stage.norm.over_time:
            x = graph.norm(graph.transpose(x, 0, 2, 1), stage.norm)
            x = graph.transpose(x, 0, 2, 1)
        else:
            x = graph.norm(x, stage.norm)
        x = graph.add("Gelu", [x])
        lowest = GELU_MIN
    return graph.transpose(x, 0, 2, 1)


def position_as_products(
    graph: Graph, layer: AnyLayer, x: str, trim: int
) -> str:
    """The positional convolution, one product per group; it gives as many
    frames as it takes."""
    if layer.algorithm == CONVOLUTION:
        return position_as_conv(graph, layer, x, trim)
    kernel, groups = layer.weight.shape[-1], layer.groups
    frames = graph.size(x, 1)
    pads = graph.constant([0, layer.padding, 0, 0, layer.padding, 0])
    q = graph.quantize(graph.add("Pad", [x, pads]), layer)
    count = graph.add("Squeeze", [frames, graph.constant([0])])
    starts = graph.add("Range", [graph.constant(0), count, graph.constant(1)])
    rows = graph.add("Unsqueeze", [starts, graph.constant([1])])
    index = graph.add("Add", [rows, graph.constant(np.arange(kernel)[None])])
    parts = (
        graph.add("Split", [q], outputs=groups, axis=2, num_outputs=groups)
        if groups > 1
        else [q]
    )
    outs = []
    size = layer.weight.shape[0] // groups
    for g, part in enumerate(parts):
        own = slice(g * size, (g + 1) * size)
        taps = graph.add("Gather", [part, index], axis=1)
        taps = graph.reshape(taps, 0, 0, kernel * layer.weight.shape[1])
        weight = graph.weight(
            layer,
            tap_major(layer.weight[own]),
            1,
            None if isinstance(layer, FloatLayer) else layer.weight_scale[own],
        )
        outs.append(
            graph.add("MatMul", [graph.dequantize(taps, layer), weight])
        )
    out = outs[0] if groups == 1 else graph.add("Concat", outs, axis=-1)
    return graph.biased(out, layer)


def position_as_conv(graph: Graph, layer: AnyLayer, x: str, trim: int) -> str:
    """The positional convolution as a Conv node, without its last frames."""
    channels_first = graph.transpose(x, 0, 2, 1)
    q = graph.quantize(channels_first, layer)
    out = graph.transpose(graph.convolution(q, layer), 0, 2, 1)
    if trim:
        first, last = graph.constant([0]), graph.constant([-trim])
        out = graph.slice(out, first, last, 1)
    return out


def _block(
    graph: Graph, spec: EncoderSpec, block: BlockSpec, x: str, mask: str | None
) -> str:
    heads = spec.num_heads
    width = block.query.weight.shape[0]
    head = width // heads

    def split(y: str, *axes: int) -> str:
        return graph.transpose(graph.reshape(y, 0, 0, heads, head), *axes)

    y = graph.norm(x, block.norm1) if spec.pre_norm else x
    query = split(graph.linear(y, block.query), 0, 2, 1, 3)
    key = split(graph.linear(y, block.key), 0, 2, 3, 1)
    value = split(graph.linear(y, block.value), 0, 2, 1, 3)
    scores = graph.add("MatMul", [query, key])
    scores = graph.add("Mul", [scores, graph.number(head**-0.5)])
    if mask is not None:
        scores = graph.add("Add", [scores, mask])
    weights = graph.add("Softmax", [scores], axis=-1)
    attended = graph.add("MatMul", [weights, value])
    attended = graph.transpose(attended, 0, 2, 1, 3)
    attended = graph.reshape(attended, 0, 0, width)
    x = graph.add("Add", [x, graph.linear(attended, block.out)])
    if not spec.pre_norm:
        x = graph.norm(x, block.norm1)
    y = graph.norm(x, block.norm2) if spec.pre_norm else x
    y = graph.add("Gelu", [graph.linear(y, block.up)])
    x = graph.add("Add", [x, graph.linear(y, block.down, GELU_MIN)])
    return x if spec.pre_norm else graph.norm(x, block.norm2)


def _valid_frames(
    graph: Graph, spec: EncoderSpec, lengths: str, frames: str
) -> str:
    """Which frames are real, bool [batch, frames]."""
    for stage in spec.convs:
        lengths = _frames_of(graph, lengths, stage.conv)
    count = graph.add("Squeeze", [frames, graph.constant([0])])
    index = graph.add("Range", [graph.constant(0), count, graph.constant(1)])
    real = graph.add("Unsqueeze", [lengths, graph.constant([1])])
    return graph.add("Less", [index, real])


def add_encoder(
    graph: Graph,
    spec: EncoderSpec,
    wave: str,
    lengths: str | None,
    as_products: bool,
) -> str:
    convs = _convs_as_products if as_products else _convs_as_convs
    position = position_as_products if as_products else position_as_conv
    x = convs(graph, spec, wave)
    x = graph.norm(x, spec.projection_norm)
    x = graph.linear(x, spec.projection)

    mask = None
    if lengths is not None:
        valid = _valid_frames(graph, spec, lengths, graph.size(x, 1))
        rows = graph.add("Unsqueeze", [valid, graph.constant([2])])
        x = graph.add("Where", [rows, x, graph.number(0.0)])
        columns = graph.add("Unsqueeze", [valid, graph.constant([1, 2])])
        ends = [graph.number(0.0), graph.number(MASKED)]
        mask = graph.add("Where", [columns, *ends])
    added = graph.add(
        "Gelu", [position(graph, spec.pos_conv, x, spec.pos_trim)]
    )
    x = graph.add("Add", [x, added])
    if not spec.pre_norm:
        x = graph.norm(x, spec.norm)
    if spec.rotation is None:
        for block in spec.blocks:
            x = _block(graph, spec, block, x, mask)
        return graph.norm(x, spec.norm) if spec.pre_norm else x
    rotation = graph.tensor(spec.rotation, "rotation")
    x = graph.add("MatMul", [x, graph.transpose(rotation, 1, 0)])
    for block in spec.blocks:
        x = _block(graph, spec, block, x, mask)
    return graph.norm(graph.add("MatMul", [x, rotation]), spec.norm)
