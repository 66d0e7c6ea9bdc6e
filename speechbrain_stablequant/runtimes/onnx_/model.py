"""An encoder and the layers after it as one ONNX file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...core.encoder_spec import AnyLayer, EncoderSpec, Norm
from ...core.integer_layer import FloatLayer, IntegerLayer, float_layer
from ...utils.files import write_atomic
from ..algorithms import plain_windows
from .encoder import add_encoder
from .graph import Graph

EXPORT_FORMAT = 1

# Protobuf holds no message of 2 GB.
MAX_BYTES = 2**31 - 2**20

#: What a file is for.
TARGETS = ("onnxruntime", "portable")


@dataclass(frozen=True)
class Activation:
    """An activation in a head: an ONNX operator and its attributes."""

    op: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


HeadPart = AnyLayer | Norm | Activation


def describe_head(
    modules: Mapping[str, nn.Module], integers: Mapping[str, IntegerLayer]
) -> list[HeadPart]:
    """Describe the modules after the encoder, in order; containers are
    walked. ValueError for a module without an ONNX form."""
    parts = (
        _head_part(name, child, integers)
        for key, module in modules.items()
        for name, child in module.named_modules(prefix=key)
    )
    return [part for part in parts if part is not None]


def _head_part(
    name: str, module: nn.Module, integers: Mapping[str, IntegerLayer]
) -> HeadPart | None:
    if isinstance(module, nn.Linear):
        return integers.get(name) or float_layer(name, module)
    if isinstance(module, nn.LayerNorm):
        weight, bias = (
            x.detach().float() for x in (module.weight, module.bias)
        )
        return Norm(weight, bias, module.eps)
    if isinstance(module, nn.LeakyReLU):
        return Activation("LeakyRelu", {"alpha": module.negative_slope})
    if isinstance(module, nn.ReLU | nn.Tanh):
        return Activation("Relu" if isinstance(module, nn.ReLU) else "Tanh")
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return Activation("Gelu")
    if isinstance(module, nn.LogSoftmax) and module.dim == -1:
        return Activation("LogSoftmax", {"axis": -1})
    if isinstance(module, nn.Identity | nn.Dropout) or any(module.children()):
        return None
    raise ValueError(
        f"{name}: {type(module).__name__} in the head has no ONNX form; "
        "export the encoder alone (head=[])"
    )


def add_head(graph: Graph, x: str, head: Iterable[HeadPart]) -> str:
    for part in head:
        if isinstance(part, Norm):
            x = graph.norm(x, part)
        elif isinstance(part, Activation):
            x = graph.add(part.op, [x], **part.attributes)
        else:
            x = graph.linear(x, part)
    return x


def _check(spec: EncoderSpec, head: Sequence[HeadPart]) -> None:
    for stage in spec.convs:
        layer = stage.conv
        if not plain_windows(layer):
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
    names: tuple[str, str] = ("wave", "logits"),
) -> Path:
    """Write an encoder, and the layers after it, as one ONNX file.

    Inputs: ``wave``, float32 [batch, samples], padded with zeros, and
    ``lengths``, int64 [batch], the real samples of each utterance. Output:
    ``logits`` [batch, frames, symbols], or ``hidden`` without a head; padded
    frames hold arbitrary finite values.

    ``normalize_wav`` and ``output_norm`` bring each wave, padding included, and
    the encoder's output to mean 0 and variance 1, as SpeechBrain's wrapper
    does. Without ``use_lengths`` there is no input ``lengths``, for a model
    that is not told what is padding. ``names`` are those of the wave and of the
    output. ``sample_rate`` and ``metadata`` are
    written into the file.

    ``target`` is ``"onnxruntime"``: activations are uint8 with zero point 128
    (the same integers, moved) and convolutions are products of unfolded inputs,
    which is what ONNX Runtime computes in integers on an x86 CPU; or
    ``"portable"``: int8 with zero point 0 and Conv nodes. An offset of the
    activations moves either zero point.

    The file is there whole or not at all. ValueError for a layer that cannot be
    exported, or more than 2 GB of weights.
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
    wave = graph.name(names[0])
    inputs = {wave: ["batch", "samples"]}
    lengths = None
    if use_lengths:
        lengths = graph.name("lengths")
        inputs[lengths] = ["batch"]
    output = graph.name(names[1] if head else "hidden")
    x = graph.standardize(wave, [1]) if normalize_wav else wave
    x = add_encoder(graph, spec, x, lengths, target == "onnxruntime")
    if output_norm:
        x = graph.standardize(x, [1, 2])
    graph.result(add_head(graph, x, head), output)
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
            # Applied inside of the graph.
            "input_normalization": "layer_norm" if normalize_wav else "none",
            "output_normalization": "layer_norm" if output_norm else "none",
            "bits": json.dumps(bits),
            **(metadata or {}),
        },
    )
    return write_atomic(path, model.SerializeToString())
