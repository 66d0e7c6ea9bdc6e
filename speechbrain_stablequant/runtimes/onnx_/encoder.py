"""Builds the ONNX nodes of an encoder from its description."""

import numpy as np

from ...core.affine import GELU_MIN
from ...core.encoder_spec import BlockSpec, EncoderSpec
from ...core.integer_layer import AnyLayer
from ..algorithms import split_groups, window_rows
from ..geometry import CONVOLUTION
from .graph import Graph

# Added to the attention scores of padded frames: exp() of it is 0, and a row
# of nothing but padding stays finite.
MASKED = -1e30


def _turn(graph: Graph, x: str) -> str:
    """[batch, a, b] to [batch, b, a]."""
    return graph.transpose(x, 0, 2, 1)


def _indices(graph: Graph, count: str) -> str:
    """0, 1, ... below an int64 [1]."""
    count = graph.add("Squeeze", [count, graph.constant([0])])
    return graph.add("Range", [graph.constant(0), count, graph.constant(1)])


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

    whole, width = kernel // stride, stride * channels
    parts = (part(i * stride, 1) for i in range(whole))
    parts = [graph.reshape(x, 0, -1, width) for x in parts]
    # A slice with a step has one row a frame.
    parts += [part(i, stride) for i in range(whole * stride, kernel)]
    return parts[0] if len(parts) == 1 else graph.add("Concat", parts, axis=-1)


def conv_as_product(
    graph: Graph, x: str, layer: AnyLayer, lowest: float = -float("inf")
) -> str:
    """A convolution of the feature extractor on [batch, time, channels]."""
    if layer.algorithm == CONVOLUTION:
        q = graph.quantize(_turn(graph, x), layer, lowest)
        return _turn(graph, graph.convolution(q, layer))
    q = unfold(graph, graph.quantize(x, layer, lowest), layer)
    return graph.product(q, layer, window_rows(layer.weight).t())


def _features(
    graph: Graph, spec: EncoderSpec, wave: str, as_products: bool
) -> str:
    """The feature extractor, to [batch, time, channels]; with Conv nodes on
    [batch, channels, time]."""
    axis = 2 if as_products else 1
    x = graph.add("Unsqueeze", [wave, graph.constant([axis])])
    lowest = -float("inf")
    for stage in spec.convs:
        if as_products:
            x = conv_as_product(graph, x, stage.conv, lowest)
        else:
            q = graph.quantize(x, stage.conv, lowest)
            x = graph.convolution(q, stage.conv)
        # LayerNorm has its channels last, the norm over time its frames.
        if stage.norm is not None and stage.norm.over_time == as_products:
            x = _turn(graph, graph.norm(_turn(graph, x), stage.norm))
        else:
            x = graph.norm(x, stage.norm)
        x = graph.add("Gelu", [x])
        lowest = GELU_MIN
    return x if as_products else _turn(graph, x)


def position(
    graph: Graph, layer: AnyLayer, x: str, trim: int, as_products: bool = True
) -> str:
    """The positional convolution, without its last ``trim`` frames; one
    product per group gives as many frames as it takes."""
    if not as_products or layer.algorithm == CONVOLUTION:
        q = graph.quantize(_turn(graph, x), layer)
        out = _turn(graph, graph.convolution(q, layer))
        if trim:
            first, last = graph.constant([0]), graph.constant([-trim])
            out = graph.slice(out, first, last, 1)
        return out
    width, kernel = layer.weight.shape[1:]
    frames = graph.size(x, 1)
    pads = graph.constant([0, layer.padding, 0, 0, layer.padding, 0])
    q = graph.quantize(graph.add("Pad", [x, pads]), layer)
    starts = _indices(graph, frames)
    rows = graph.add("Unsqueeze", [starts, graph.constant([1])])
    index = graph.add("Add", [rows, graph.constant(np.arange(kernel)[None])])
    count, parts = layer.groups, [q]
    if count > 1:
        parts = graph.add("Split", [q], count, axis=2, num_outputs=count)
    outs = []
    for part, group in zip(parts, split_groups(layer), strict=True):
        taps = graph.add("Gather", [part, index], axis=1)
        taps = graph.reshape(taps, 0, 0, kernel * width)
        weight = graph.weight(group, window_rows(group.weight).t(), 1)
        taps = graph.dequantize(taps, layer)
        outs.append(graph.add("MatMul", [taps, weight]))
    out = outs[0] if count == 1 else graph.add("Concat", outs, axis=-1)
    return graph.biased(out, layer)


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
    index = _indices(graph, frames)
    real = graph.add("Unsqueeze", [lengths, graph.constant([1])])
    return graph.add("Less", [index, real])


def add_encoder(
    graph: Graph,
    spec: EncoderSpec,
    wave: str,
    lengths: str | None,
    as_products: bool,
) -> str:
    x = _features(graph, spec, wave, as_products)
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
    added = position(graph, spec.pos_conv, x, spec.pos_trim, as_products)
    x = graph.add("Add", [x, graph.add("Gelu", [added])])
    if not spec.pre_norm:
        x = graph.norm(x, spec.norm)
    if spec.rotation is not None:
        rotation = graph.tensor(spec.rotation, "rotation")
        x = graph.add("MatMul", [x, graph.transpose(rotation, 1, 0)])
    for block in spec.blocks:
        x = _block(graph, spec, block, x, mask)
    if spec.rotation is not None:
        x = graph.add("MatMul", [x, rotation])
    return graph.norm(x, spec.norm) if spec.pre_norm else x
