"""ONNX with QuantizeLinear/DequantizeLinear, for ONNX Runtime and others.

The graph is built from the description of an encoder
(:mod:`speechbrain_stablequant.runtime.encoder`), not traced: weights stay
int8 in the file, batch and time are dynamic, and padding is masked inside.

A layer's input is clipped to ``[-amax, amax]``, which an offset of the
activations moves together with the zero point, and then quantized. Both ends
are values of the grid, so this equals the clamp after the rounding of
:mod:`speechbrain_stablequant.numerics`, also for 8 bits, where
QuantizeLinear alone would go down to -128. ONNX divides by the scale where
`numerics` multiplies by its reciprocal: a value within float rounding of a
tie may fall to its other side, all others are the same integers.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .files import write_atomic
from .integer import FloatLayer, IntegerLayer, float_layer
from .layers import find_encoders
from .numerics import qmax
from .runtime.encoder import (
    AnyLayer,
    BlockSpec,
    EncoderSpec,
    Norm,
    describe_encoder,
)

EXPORT_FORMAT = 1

# The first opset with Gelu; the IR version that goes with it.
OPSET, IR_VERSION = 20, 9

# Protobuf holds no message of 2 GB.
MAX_BYTES = 2**31 - 2**20

#: Whom a file is for.
TARGETS = ("onnxruntime", "portable")

# Added to the attention scores of padded frames: exp() of it is 0, and a row
# of nothing but padding stays finite.
MASKED = -1e30

# GELU never falls below this.
GELU_MIN = -0.17

#: What layers may need beyond plain integers.
EXECUTED = frozenset({"asymmetric"})


@dataclass(frozen=True)
class Activation:
    """An activation between the layers of a head.

    Arguments
    ---------
    op : str
        ``"Relu"``, ``"LeakyRelu"``, ``"Gelu"``, ``"Tanh"`` or
        ``"LogSoftmax"`` (over the last axis).
    slope : float
        Of LeakyRelu, below 0.
    """

    op: str
    slope: float = 0.01


_ACTIVATIONS = {nn.ReLU: "Relu", nn.Tanh: "Tanh"}

HeadPart = AnyLayer | Norm | Activation


def require_onnx() -> Any:
    """The onnx package.

    Returns
    -------
    module

    Raises
    ------
    ImportError
        It is not installed; names the extra that brings it.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "export: package 'onnx' is not installed; run "
            "pip install 'speechbrain_stablequant[onnx]'"
        ) from error
    return onnx


def describe_head(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> list[HeadPart]:
    """Describes what stands behind the encoder, in the order of the modules.

    Arguments
    ---------
    modules : Mapping
        Modules by their names in the Brain's modules, such as ``enc`` and
        ``ctc_lin``; containers are walked in order.
    integers : Mapping
        Integer layers by name; others are taken as they are.

    Returns
    -------
    list of IntegerLayer, FloatLayer, Norm and Activation

    Raises
    ------
    ValueError
        A module that has no ONNX form here.

    Example
    -------
    >>> head = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 3))
    >>> [type(part).__name__ for part in describe_head({"enc": head}, {})]
    ['FloatLayer', 'Activation', 'FloatLayer']
    """
    parts: list[HeadPart] = []
    for key, module in modules.items():
        for name, child in module.named_modules(prefix=key):
            part = _head_part(name, child, integers)
            if part is not None:
                parts.append(part)
    return parts


def _head_part(
    name: str, module: nn.Module, integers: Mapping[str, IntegerLayer]
) -> HeadPart | None:
    if isinstance(module, nn.Linear):
        return integers.get(name) or float_layer(name, module)
    if isinstance(module, nn.LayerNorm):
        return Norm(
            module.weight.detach().float(),
            module.bias.detach().float(),
            module.eps,
        )
    if isinstance(module, nn.LeakyReLU):
        return Activation("LeakyRelu", module.negative_slope)
    for kind, op in _ACTIVATIONS.items():
        if isinstance(module, kind):
            return Activation(op)
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return Activation("Gelu")
    if isinstance(module, nn.LogSoftmax) and module.dim == -1:
        return Activation("LogSoftmax")
    if isinstance(module, nn.Identity | nn.Dropout) or any(module.children()):
        return None
    raise ValueError(
        f"{name}: {type(module).__name__} in the head has no ONNX form; "
        "export the encoder alone (head=[])"
    )


class Graph:
    """Collects nodes and constants of an ONNX graph.

    Arguments
    ---------
    unsigned : bool
        Activations as uint8 with zero point 128 instead of int8 with 0; an
        offset moves either.
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
        """The finished model.

        Arguments
        ---------
        inputs : Mapping
            Shape by name; ``lengths`` is int64, all others float32.
        output : str
            Name of the only output, float32.
        shape : sequence
            Its shape.
        metadata : Mapping
            Text by key.

        Returns
        -------
        onnx.ModelProto
        """
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        given = [
            helper.make_tensor_value_info(
                name, kinds.INT64 if name == "lengths" else kinds.FLOAT, axes
            )
            for name, axes in inputs.items()
        ]
        made = helper.make_tensor_value_info(output, kinds.FLOAT, shape)
        model = helper.make_model(
            helper.make_graph(
                self.nodes,
                "speechbrain_stablequant",
                given,
                [made],
                initializer=self.initializers,
            ),
            producer_name="speechbrain_stablequant",
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )
        helper.set_model_props(model, metadata)
        return model

    def name(self, stem: str) -> str:
        """A name that is not in use yet."""
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return f"{stem}_{count}" if count else stem

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        name: str | None = None,
        outputs: int = 1,
        **attributes: Any,
    ) -> Any:
        """Adds a node.

        Arguments
        ---------
        op : str
            The operator.
        inputs : sequence of str
            Names of its inputs.
        name : str, optional
            Of its output; made from the operator by default.
        outputs : int
            How many outputs it has.
        **attributes
            Of the operator.

        Returns
        -------
        str or list of str
            Name of the output, or of the outputs.
        """
        names = [self.name(name or op) for _ in range(outputs)]
        self.nodes.append(
            self.onnx.helper.make_node(
                op, list(inputs), names, name=f"{names[0]}/{op}", **attributes
            )
        )
        return names[0] if outputs == 1 else names

    def result(self, x: str, name: str) -> None:
        """Gives a value the name of the output, taken from :meth:`name`."""
        self.nodes.append(self.onnx.helper.make_node("Identity", [x], [name]))

    def tensor(self, value: torch.Tensor | np.ndarray, name: str) -> str:
        """Adds a stored tensor and returns its name."""
        array = value.numpy() if isinstance(value, torch.Tensor) else value
        name = self.name(name)
        self.initializers.append(
            self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        )
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Name of a small constant; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            # from_array, not tensor(): a 0-d array has to stay one.
            name = self.name("constant")
            self.initializers.append(
                self.onnx.numpy_helper.from_array(array, name)
            )
            self._constants[key] = name
        return self._constants[key]

    def number(self, value: float) -> str:
        """Name of a float32 scalar."""
        return self.constant(value, np.float32)

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis, -1 is what is left."""
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
        zero = layer.zero_point()
        if self.unsigned:
            return self.constant(128 + zero, np.uint8)
        return self.constant(zero, np.int8)

    def quantize(
        self, x: str, layer: AnyLayer, lowest: float = -float("inf")
    ) -> str:
        """A layer's input as integers, or as it is for a float layer.

        Arguments
        ---------
        x : str
            The float input.
        layer : IntegerLayer or FloatLayer
            The layer.
        lowest : float
            A bound below which ``x`` never falls.

        Returns
        -------
        str
            int8 (uint8) integers to be passed on to :meth:`dequantize`.
        """
        if isinstance(layer, FloatLayer):
            return x
        scale = np.float32(layer.activation_scale.item())
        limit, zero = qmax(layer.activation_bits), layer.zero_point()
        key = (x, float(scale), limit, zero)
        if key in self._quantized:
            return self._quantized[key]
        low = np.float32(-limit - zero) * scale
        high = np.float32(limit - zero) * scale
        # QuantizeLinear itself ends at 127.
        if limit < 127 or lowest < low:
            bounds = [self.number(low), self.number(high)]
            clipped = self.add("Clip", [x, *bounds])
        else:
            clipped = x
        out = self.add(
            "QuantizeLinear", [clipped, self.number(scale), self._zero(layer)]
        )
        self._quantized[key] = out
        return out

    def dequantize(self, q: str, layer: AnyLayer) -> str:
        """What the integers of :meth:`quantize` stand for."""
        if isinstance(layer, FloatLayer):
            return q
        scale = self.number(layer.activation_scale.item())
        return self.add("DequantizeLinear", [q, scale, self._zero(layer)])

    def weight(
        self,
        layer: AnyLayer,
        weight: torch.Tensor,
        axis: int,
        scale: torch.Tensor | None = None,
    ) -> str:
        """A layer's weight in some layout.

        Arguments
        ---------
        layer : IntegerLayer or FloatLayer
            The layer.
        weight : torch.Tensor
            Its weight, rearranged.
        axis : int
            Axis of the output channels.
        scale : torch.Tensor, optional
            Their scales, if these are not all channels of the layer.

        Returns
        -------
        str
            Name of the float weight.
        """
        stored = self.tensor(weight.contiguous(), f"{layer.name}.weight")
        if isinstance(layer, FloatLayer):
            return stored
        scale = layer.weight_scale if scale is None else scale
        return self.add(
            "DequantizeLinear",
            [
                stored,
                self.tensor(scale, f"{layer.name}.weight_scale"),
                self.constant(np.zeros(scale.shape), np.int8),
            ],
            axis=axis,
        )

    def product(self, q: str, layer: AnyLayer, weight: torch.Tensor) -> str:
        """Integers [..., K] times a weight [K, N], with the bias."""
        x = self.dequantize(q, layer)
        out = self.add("MatMul", [x, self.weight(layer, weight, 1)])
        return self.biased(out, layer)

    def biased(self, x: str, layer: AnyLayer) -> str:
        """Adds the bias, if any, along the last axis."""
        if layer.bias is None:
            return x
        return self.add(
            "Add", [x, self.tensor(layer.bias, f"{layer.name}.bias")]
        )

    def linear(
        self, x: str, layer: AnyLayer, lowest: float = -float("inf")
    ) -> str:
        """A Linear on a float input [..., K]."""
        return self.product(
            self.quantize(x, layer, lowest), layer, layer.weight.t()
        )

    def convolution(self, q: str, layer: AnyLayer) -> str:
        """A Conv1d on the integers [batch, channels, time] of its input."""
        inputs = [
            self.dequantize(q, layer),
            self.weight(layer, layer.weight, 0),
        ]
        if layer.bias is not None:
            inputs.append(self.tensor(layer.bias, f"{layer.name}.bias"))
        return self.add(
            "Conv",
            inputs,
            strides=[layer.stride],
            pads=[layer.padding] * 2,
            dilations=[layer.dilation],
            group=layer.groups,
        )

    def norm(self, x: str, norm: Norm | None) -> str:
        """A normalisation: [..., channels], or [batch, channels, time] if it
        runs over time."""
        if norm is None:
            return x
        inputs = [
            x,
            self.tensor(norm.weight, "norm.weight"),
            self.tensor(norm.bias, "norm.bias"),
        ]
        if norm.over_time:
            return self.add("InstanceNormalization", inputs, epsilon=norm.eps)
        return self.add("LayerNormalization", inputs, axis=-1, epsilon=norm.eps)

    def standardize(self, x: str, axes: Sequence[int]) -> str:
        """Mean 0 and variance 1 over some axes: a layer_norm without
        weights."""
        over = self.constant(axes)
        centred = self.add("Sub", [x, self.add("ReduceMean", [x, over])])
        square = self.add("Mul", [centred, centred])
        variance = self.add("ReduceMean", [square, over])
        safe = self.add("Add", [variance, self.number(1e-5)])
        return self.add("Div", [centred, self.add("Sqrt", [safe])])


def _frames_of(graph: Graph, samples: str, layer: AnyLayer) -> str:
    """max((samples - kernel) // stride + 1, 0) on int64: the division of
    ONNX rounds towards zero, so its operand is kept from being negative."""
    shift = layer.stride - layer.weight.shape[-1]
    moved = graph.add("Add", [samples, graph.constant([shift])])
    safe = graph.add("Max", [moved, graph.constant([0])])
    return graph.add("Div", [safe, graph.constant([layer.stride])])


def _unfold(graph: Graph, q: str, layer: AnyLayer) -> str:
    """[batch, time, channels] to [batch, frames, kernel * channels]: whole
    strides are a reshape, only what a kernel has beyond them is copied."""
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


def _tap_major(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, kernel] to [kernel * in, out], as :func:`_unfold` needs."""
    return weight.permute(2, 1, 0).reshape(-1, weight.shape[0])


def _convs_as_products(graph: Graph, spec: EncoderSpec, wave: str) -> str:
    """The feature extractor on [batch, time, channels]."""
    x = graph.add("Unsqueeze", [wave, graph.constant([2])])
    lowest = -float("inf")
    for stage in spec.convs:
        layer = stage.conv
        q = graph.quantize(x, layer, lowest)
        q = _unfold(graph, q, layer)
        x = graph.product(q, layer, _tap_major(layer.weight))
        if stage.norm is not None and stage.norm.over_time:
            x = graph.norm(graph.transpose(x, 0, 2, 1), stage.norm)
            x = graph.transpose(x, 0, 2, 1)
        else:
            x = graph.norm(x, stage.norm)
        x = graph.add("Gelu", [x])
        lowest = GELU_MIN
    return x


def _convs_as_convs(graph: Graph, spec: EncoderSpec, wave: str) -> str:
    """The same with Conv nodes, on [batch, channels, time]."""
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


def _position_as_products(graph: Graph, spec: EncoderSpec, x: str) -> str:
    """The positional convolution, one product for each group."""
    layer = spec.pos_conv
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
            _tap_major(layer.weight[own]),
            1,
            None if isinstance(layer, FloatLayer) else layer.weight_scale[own],
        )
        outs.append(
            graph.add("MatMul", [graph.dequantize(taps, layer), weight])
        )
    out = outs[0] if groups == 1 else graph.add("Concat", outs, axis=-1)
    return graph.biased(out, layer)


def _position_as_conv(graph: Graph, spec: EncoderSpec, x: str) -> str:
    """The positional convolution as a Conv node."""
    channels_first = graph.transpose(x, 0, 2, 1)
    q = graph.quantize(channels_first, spec.pos_conv)
    out = graph.transpose(graph.convolution(q, spec.pos_conv), 0, 2, 1)
    if spec.pos_trim:
        first, last = graph.constant([0]), graph.constant([-spec.pos_trim])
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


def _encoder(
    graph: Graph,
    spec: EncoderSpec,
    wave: str,
    lengths: str | None,
    as_products: bool,
) -> str:
    convs = _convs_as_products if as_products else _convs_as_convs
    position = _position_as_products if as_products else _position_as_conv
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
    added = graph.add("Gelu", [position(graph, spec, x)])
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


def _head(graph: Graph, x: str, head: Iterable[HeadPart]) -> str:
    for part in head:
        if isinstance(part, Norm):
            x = graph.norm(x, part)
        elif isinstance(part, Activation):
            options = {
                "LeakyRelu": {"alpha": part.slope},
                "LogSoftmax": {"axis": -1},
            }
            x = graph.add(part.op, [x], **options.get(part.op, {}))
        else:
            x = graph.linear(x, part)
    return x


def _check(spec: EncoderSpec, head: Sequence[HeadPart]) -> None:
    for layer in [*spec.layers(), *head]:
        extras = sorted(getattr(layer, "extras", frozenset()) - EXECUTED)
        if extras:
            raise ValueError(
                f"{layer.name}: a plan with {', '.join(extras)} cannot be "
                "exported; leave that switch off"
            )
    for stage in spec.convs:
        layer = stage.conv
        if layer.groups != 1 or layer.dilation != 1 or layer.padding:
            raise ValueError(
                f"{layer.name}: a convolution with groups, dilation or "
                "padding in the front end cannot be exported"
            )
    if spec.pos_conv.stride != 1 or spec.pos_conv.dilation != 1:
        raise ValueError(
            f"{spec.pos_conv.name}: a positional convolution with a stride "
            "or dilation cannot be exported"
        )
    for part in head:
        if getattr(part, "kind", "linear") != "linear":
            raise ValueError(
                f"{part.name}: a {part.kind} in the head cannot be "
                "exported; export the encoder alone (head=[])"
            )


def export_onnx(
    path: str | Path,
    spec: EncoderSpec,
    head: Sequence[HeadPart] = (),
    *,
    normalize_wav: bool = False,
    output_norm: bool = False,
    use_lengths: bool = True,
    sample_rate: int = 16000,
    target: str = "onnxruntime",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes an encoder, and the layers behind it, as one ONNX file.

    Its inputs are ``wave``, float32 [batch, samples], padded with zeros, and
    ``lengths``, int64 [batch], the real samples of each utterance; its output
    is ``logits`` [batch, frames, symbols], or ``hidden`` without a head.
    Frames of padding hold anything finite.

    Arguments
    ---------
    path : str or Path
        The file; it is there whole or not at all. Its folder must exist.
    spec : EncoderSpec
        The encoder.
    head : sequence
        Layers behind it, see :func:`describe_head`.
    normalize_wav : bool
        Whether the graph first brings each wave, padding included, to mean 0
        and variance 1, as SpeechBrain's wrapper does with its
        ``normalize_wav``. Without it a model that needs this has to be given
        normalised waves.
    output_norm : bool
        The same for the encoder's output, as the wrapper's ``output_norm``.
    use_lengths : bool
        False for a model that is not told what is padding: there is no input
        ``lengths`` then.
    sample_rate : int
        Written into the file.
    target : str
        ``"onnxruntime"``: activations are uint8 with zero point 128 (the same
        integers, moved) and convolutions are products of unfolded inputs,
        which is what ONNX Runtime computes in integers on an x86 CPU;
        ``"portable"``: int8 with zero point 0 and Conv nodes. An offset of
        the activations moves either zero point.
    metadata : Mapping, optional
        More text by key for the file's metadata.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        onnx is not installed.
    ValueError
        An unknown target, a layer that cannot be exported, or more than 2 GB
        of weights.
    """
    if target not in TARGETS:
        raise ValueError(f"target: '{target}' is none of {', '.join(TARGETS)}")
    head = list(head)
    _check(spec, head)
    behind = [p for p in head if isinstance(p, IntegerLayer | FloatLayer)]
    layers = [*spec.layers(), *behind]
    size = sum(layer.weight.nbytes for layer in layers)
    if size > MAX_BYTES:
        raise ValueError(
            f"the weights take {size / 1e9:.1f} GB and an ONNX file holds "
            "2 GB; quantize more layers"
        )
    graph = Graph(unsigned=target == "onnxruntime")
    wave = graph.name("wave")
    inputs = {wave: ["batch", "samples"]}
    lengths = None
    if use_lengths:
        lengths = graph.name("lengths")
        inputs[lengths] = ["batch"]
    output = graph.name("logits" if head else "hidden")
    x = graph.standardize(wave, [1]) if normalize_wav else wave
    x = _encoder(graph, spec, x, lengths, target == "onnxruntime")
    if output_norm:
        x = graph.standardize(x, [1, 2])
    graph.result(_head(graph, x, head), output)
    width = behind[-1].weight.shape[0] if behind else spec.norm.weight.numel()
    bits = {
        layer.name: [layer.weight_bits, layer.activation_bits]
        for layer in layers
        if isinstance(layer, IntegerLayer)
    }
    model = graph.model(
        inputs,
        output,
        ["batch", "frames", width],
        {
            "format": f"speechbrain_stablequant.onnx {EXPORT_FORMAT}",
            "sample_rate": str(sample_rate),
            # What the graph itself does to the wave.
            "input_normalization": "layer_norm" if normalize_wav else "none",
            "output_normalization": "layer_norm" if output_norm else "none",
            "bits": json.dumps(bits),
            **(metadata or {}),
        },
    )
    return write_atomic(path, model.SerializeToString())


def export_folder(
    folder: str | Path, path: str | Path, target: str = "onnxruntime"
) -> Path:
    """Writes the model of a quantized folder as one ONNX file.

    It takes audio as it is: the normalisation that the model wants is in the
    graph. The labels, as a JSON list, and the index of the blank are in the
    file's metadata, under ``labels`` and ``blank_index``.

    Arguments
    ---------
    folder : str or Path
        A folder that ``EncoderASR.from_hparams`` loads.
    path : str or Path
        The file. Its folder must exist.
    target : str
        As of :func:`export_onnx`.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        onnx is not installed.
    CheckpointError
        The folder is damaged or holds something else.
    ValueError
        A model that cannot be exported.
    """
    # The package below needs no SpeechBrain; this does.
    from hyperpyyaml import load_hyperpyyaml

    from .checkpoint import load_checkpoint

    require_onnx()
    integers = load_checkpoint(folder).integers
    yaml = Path(folder) / "hyperparams.yaml"
    if not yaml.is_file():
        raise ValueError(
            f"{yaml}: there is no such file; the run that wrote the folder "
            "says in its report why it has no recogniser"
        )
    with open(yaml, encoding="utf-8") as stream:
        hparams = load_hyperpyyaml(stream)
    loader = hparams["pretrainer"]
    loader.collect_files(default_source=str(folder))
    loader.load_collected()
    recogniser, tokenizer = loader.recogniser, loader.tokenizer
    settings = recogniser.encoder_settings
    if settings.get("output_all_hiddens"):
        raise ValueError(
            f"{yaml}: a model with output_all_hiddens cannot be exported"
        )
    parts = dict(recogniser.parts.items())
    (encoder,) = find_encoders({settings["key"]: parts.pop(settings["key"])})
    return export_onnx(
        path,
        describe_encoder(encoder.model, encoder.path, integers),
        describe_head(parts, integers),
        normalize_wav=settings["normalize_wav"],
        output_norm=settings["output_norm"],
        use_lengths=settings["use_lengths"],
        sample_rate=hparams["sample_rate"],
        target=target,
        metadata={
            "labels": json.dumps(_labels(tokenizer), ensure_ascii=False),
            "blank_index": str(hparams["blank_index"]),
        },
    )


def _labels(tokenizer: Any) -> list[str]:
    """What each index stands for, of SpeechBrain's encoder or SentencePiece."""
    if hasattr(tokenizer, "ind2lab"):
        return [tokenizer.ind2lab[i] for i in range(len(tokenizer))]
    return [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
