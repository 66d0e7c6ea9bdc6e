"""A wav2vec 2.0 or HuBERT encoder as data: what every runtime executes.

It is taken from a live model and its integer layers, or from the skeleton of a
quantized folder, whose parameters are on the ``meta`` device.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..model.layers import find_encoders
from ..model.rotation import rotation_of
from .integer_layer import FloatLayer, IntegerLayer, float_layer

AnyLayer = IntegerLayer | FloatLayer


@dataclass(frozen=True)
class Norm:
    """LayerNorm over channels, or GroupNorm with one channel per group."""

    weight: torch.Tensor = field(repr=False)  # float32 [channels]
    bias: torch.Tensor = field(repr=False)  # float32 [channels]
    eps: float
    # GroupNorm of base models' first convolution, over time
    over_time: bool = False


@dataclass(frozen=True)
class ConvSpec:
    """conv -> norm, if any -> GELU."""

    conv: AnyLayer
    norm: Norm | None


@dataclass(frozen=True)
class BlockSpec:
    """A transformer block.

    With ``EncoderSpec.pre_norm``: x += out(attend(norm1(x))); x +=
    down(gelu(up(norm2(x)))). Otherwise: x = norm1(x + out(attend(x))); x =
    norm2(x + down(gelu(up(x)))).
    """

    norm1: Norm
    query: AnyLayer
    key: AnyLayer
    value: AnyLayer
    out: AnyLayer
    norm2: Norm
    up: AnyLayer
    down: AnyLayer

    def layers(self) -> tuple[AnyLayer, ...]:
        """The six layers in execution order."""
        return (
            self.query,
            self.key,
            self.value,
            self.out,
            self.up,
            self.down,
        )


@dataclass(frozen=True)
class EncoderSpec:
    """The whole encoder.

    wave [B, L] -> convs -> [B, T, C] -> projection_norm -> projection ->
    x, zero at padded frames -> x + gelu(pos_conv(x)) without its last
    ``pos_trim`` frames -> (``norm`` here unless pre_norm) -> (x @ rotation.T)
    -> blocks -> (x @ rotation) -> (``norm`` here if pre_norm).

    Arguments
    ---------
    convs : tuple of ConvSpec
        The feature extractor.
    projection_norm : Norm or None
        Before the projection; None for a HuBERT without it.
    projection : IntegerLayer or FloatLayer
        Linear.
    pos_conv : IntegerLayer or FloatLayer
        Grouped convolution, weight norm folded in.
    pos_trim : int
        Output frames to drop at the end, 1 for even kernels.
    norm : Norm
        Of the encoder.
    blocks : tuple of BlockSpec
        The transformer.
    num_heads : int
        Attention heads.
    pre_norm : bool
        Stable layer norm (large models).
    rotation : torch.Tensor or None
        float32 [channels, channels], orthogonal, see
        :mod:`speechbrain_stablequant.model.rotation`; with ``pre_norm`` only.
    """

    convs: tuple[ConvSpec, ...]
    projection_norm: Norm | None
    projection: AnyLayer
    pos_conv: AnyLayer
    pos_trim: int
    norm: Norm
    blocks: tuple[BlockSpec, ...]
    num_heads: int
    pre_norm: bool
    rotation: torch.Tensor | None = field(default=None, repr=False)

    def layers(self) -> Iterator[AnyLayer]:
        """All layers in network order."""
        for stage in self.convs:
            yield stage.conv
        yield self.projection
        yield self.pos_conv
        for block in self.blocks:
            yield from block.layers()

    def with_layers(
        self, change: Callable[[AnyLayer], AnyLayer]
    ) -> "EncoderSpec":
        """The same encoder with each layer replaced by ``change(layer)``."""
        blocks = []
        for block in self.blocks:
            names = ("query", "key", "value", "out", "up", "down")
            layers = {name: change(getattr(block, name)) for name in names}
            blocks.append(replace(block, **layers))
        return replace(
            self,
            convs=tuple(
                replace(stage, conv=change(stage.conv)) for stage in self.convs
            ),
            projection=change(self.projection),
            pos_conv=change(self.pos_conv),
            blocks=tuple(blocks),
        )

    def frames(self, samples: int) -> int:
        """Number of frames that the convolutions produce."""
        for stage in self.convs:
            kernel = stage.conv.weight.shape[-1]
            samples = max((samples - kernel) // stage.conv.stride + 1, 0)
        return samples


#: Attribute paths that an encoder must have; ``*`` stands for each item.
_PARTS = (
    "feature_extractor.conv_layers.*.conv",
    "feature_extractor.conv_layers.*.activation",
    "feature_projection.projection",
    "encoder.pos_conv_embed.conv",
    "encoder.pos_conv_embed.activation",
    "encoder.pos_conv_embed.padding.num_pad_remove",
    "encoder.layer_norm",
    "encoder.layers.*.attention.q_proj",
    "encoder.layers.*.attention.k_proj",
    "encoder.layers.*.attention.v_proj",
    "encoder.layers.*.attention.out_proj",
    "encoder.layers.*.layer_norm",
    "encoder.layers.*.feed_forward.intermediate_dense",
    "encoder.layers.*.feed_forward.intermediate_act_fn",
    "encoder.layers.*.feed_forward.output_dense",
    "encoder.layers.*.final_layer_norm",
    "config.num_attention_heads",
    "config.do_stable_layer_norm",
)


def _has(owner: Any, path: str) -> bool:
    """Whether an attribute path exists; ``*`` stands for each item."""
    part, _, rest = path.partition(".")
    if part == "*":
        return all(_has(item, rest) for item in owner)
    if not hasattr(owner, part):
        return False
    return not rest or _has(getattr(owner, part), rest)


def _check_parts(model: nn.Module, path: str) -> None:
    for part in _PARTS:
        if not _has(model, part):
            raise _unsupported(
                path, f"{type(model).__name__} (it has no {part})"
            )


def _unsupported(where: str, what: str, known: str = "") -> ValueError:
    return ValueError(
        f"{where}: {what} is not supported by the integer runtimes"
        f"{known and f', only {known}'}; use backend: torch"
    )


def _check_plain(module: nn.Module, kind: type[nn.Module], where: str) -> None:
    """Refuse subclasses with their own forward, such as adapters."""
    if not isinstance(module, kind) or type(module).forward != kind.forward:
        raise _unsupported(
            where, type(module).__name__, f"a plain {kind.__name__}"
        )


def _norm(module: nn.Module, where: str) -> Norm:
    over_time = isinstance(module, nn.GroupNorm)
    if not over_time:
        _check_plain(module, nn.LayerNorm, where)
    if over_time and module.num_groups != module.num_channels:
        raise _unsupported(
            where,
            f"GroupNorm with {module.num_groups} groups of "
            f"{module.num_channels} channels",
        )
    if module.weight is None or module.bias is None:
        raise _unsupported(where, "a normalization without weight and bias")
    return Norm(
        module.weight.detach().float(),
        module.bias.detach().float(),
        module.eps,
        over_time,
    )


def _check_gelu(module: nn.Module, where: str) -> None:
    name = type(module).__name__
    approximate = getattr(module, "approximate", "none")
    if name not in ("GELU", "GELUActivation") or approximate != "none":
        said = name if approximate == "none" else f"{name} ({approximate})"
        raise _unsupported(where, f"activation {said}", "GELU")


class _Reader:
    """Describes the parts of an encoder, see :func:`describe_encoder`."""

    def __init__(
        self, model: nn.Module, path: str, integers: Mapping[str, IntegerLayer]
    ):
        self.path, self.integers = path, integers
        self.names = {id(m): f"{path}.{n}" for n, m in model.named_modules()}

    def layer(self, module: nn.Module, kind: type[nn.Module]) -> AnyLayer:
        name = self.names[id(module)]
        _check_plain(module, kind, name)
        found = self.integers.get(name)
        return float_layer(name, module) if found is None else found

    def linear(self, module: nn.Module) -> AnyLayer:
        return self.layer(module, nn.Linear)

    def norm(self, module: nn.Module | None) -> Norm | None:
        return module and _norm(module, self.names[id(module)])

    def conv(self, stage: nn.Module) -> ConvSpec:
        _check_gelu(stage.activation, f"{self.path}.feature_extractor")
        norm = self.norm(getattr(stage, "layer_norm", None))
        conv = self.layer(stage.conv, nn.Conv1d)
        if norm is not None and norm.over_time:
            # Every call reads its weight, see runtimes/group_norm.py.
            conv = conv.loaded()
        return ConvSpec(conv, norm)

    def position(self, embedding: nn.Module) -> AnyLayer:
        _check_gelu(embedding.activation, f"{self.path}.pos_conv_embed")
        if getattr(embedding, "batch_norm", None) is not None:
            where = f"{self.path}.encoder.pos_conv_embed"
            raise _unsupported(where, "batch norm")
        return self.layer(embedding.conv, nn.Conv1d)

    def block(self, block: nn.Module) -> BlockSpec:
        if getattr(block, "adapter_layer", None) is not None:
            where = f"{self.path}.encoder.layers"
            raise _unsupported(where, "an attention adapter")
        attention, forward = block.attention, block.feed_forward
        _check_gelu(forward.intermediate_act_fn, f"{self.path}.feed_forward")
        return BlockSpec(
            norm1=self.norm(block.layer_norm),
            query=self.linear(attention.q_proj),
            key=self.linear(attention.k_proj),
            value=self.linear(attention.v_proj),
            out=self.linear(attention.out_proj),
            norm2=self.norm(block.final_layer_norm),
            up=self.linear(forward.intermediate_dense),
            down=self.linear(forward.output_dense),
        )


def describe_encoder(
    model: nn.Module, path: str, integers: Mapping[str, IntegerLayer]
) -> EncoderSpec:
    """Describes a HuggingFace encoder.

    Arguments
    ---------
    model : torch.nn.Module
        A ``Wav2Vec2Model`` or ``HubertModel``; parameters of layers that are
        in ``integers`` are not read.
    path : str
        Path of the model in the Brain's modules, the prefix of layer names.
    integers : Mapping
        Integer layers by name.

    Returns
    -------
    EncoderSpec

    Raises
    ------
    ValueError
        Something that the integer runtimes do not compute: another family of
        models, an adapter, another activation, another normalization, a
        rotation around blocks that normalize behind each sublayer.
    """

    _check_parts(model, path)
    read = _Reader(model, path, integers)
    encoder, projection = model.encoder, model.feature_projection
    if getattr(model, "adapter", None) is not None:
        raise _unsupported(f"{path}.adapter", "a convolutional adapter")
    rotation, pre_norm = rotation_of(encoder), model.config.do_stable_layer_norm
    if rotation is not None and not pre_norm:
        raise ValueError(
            f"{path}.encoder: a rotated stream needs blocks that normalize "
            "before each sublayer (do_stable_layer_norm); leave that switch off"
        )
    return EncoderSpec(
        convs=tuple(map(read.conv, model.feature_extractor.conv_layers)),
        projection_norm=read.norm(getattr(projection, "layer_norm", None)),
        projection=read.linear(projection.projection),
        pos_conv=read.position(encoder.pos_conv_embed),
        pos_trim=encoder.pos_conv_embed.padding.num_pad_remove,
        norm=read.norm(encoder.layer_norm),
        blocks=tuple(map(read.block, encoder.layers)),
        num_heads=model.config.num_attention_heads,
        pre_norm=bool(pre_norm),
        rotation=rotation,
    )


def check_encoders(modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if the integer runtimes cannot compute an encoder."""
    for encoder in find_encoders(modules):
        if getattr(encoder.wrapper, "output_all_hiddens", False):
            raise ValueError(
                "backend: the integer runtimes give the last hidden state "
                "only, and the recipe wants all; write backend: torch"
            )
        if getattr(encoder.model.config, "output_hidden_states", False):
            raise ValueError(
                f"backend: the integer runtimes give the last hidden state "
                f"only, and {type(encoder.wrapper).__name__} asks the model "
                "for all (output_hidden_states); write backend: torch"
            )
        try:
            describe_encoder(encoder.model, encoder.path, {})
        except ValueError as error:
            raise ValueError(f"backend: {error}") from error
