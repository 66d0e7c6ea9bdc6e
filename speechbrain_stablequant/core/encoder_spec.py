"""A wav2vec 2.0 or HuBERT encoder as data: what every runtime executes.

It is taken from a live model and its integer layers, or from the skeleton of a
quantized folder, whose parameters are on the ``meta`` device.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..model.encoders import Encoder, conv_frames, find_encoders
from ..model.rotation import rotation_of
from .integer_layer import AnyLayer, IntegerLayer, float_layer

#: The layers of a block in execution order, and where transformers has them.
_BLOCK_LAYERS = {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.out_proj",
    "up": "feed_forward.intermediate_dense",
    "down": "feed_forward.output_dense",
}


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
        return tuple(getattr(self, name) for name in _BLOCK_LAYERS)


@dataclass(frozen=True)
class EncoderSpec:
    """The whole encoder.

    wave [B, L] -> convs -> [B, T, C] -> projection_norm -> projection ->
    x, zero at padded frames -> x + gelu(pos_conv(x)) without its last
    ``pos_trim`` frames -> (``norm`` here unless pre_norm) -> (x @ rotation.T)
    -> blocks -> (x @ rotation) -> (``norm`` here if pre_norm).
    """

    convs: tuple[ConvSpec, ...]
    projection_norm: Norm | None  # some HuBERTs have none
    projection: AnyLayer
    pos_conv: AnyLayer  # grouped, weight norm folded in
    pos_trim: int  # output frames to drop at the end, 1 for even kernels
    norm: Norm
    blocks: tuple[BlockSpec, ...]
    num_heads: int
    pre_norm: bool  # stable layer norm, of large models
    # float32 [channels, channels], orthogonal; with pre_norm only
    rotation: torch.Tensor | None = field(default=None, repr=False)
    # largest value of the residual stream while calibrating, if known
    residual_amax: float | None = None

    def layers(self) -> Iterator[AnyLayer]:
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

        def changed(part: Any, names: Iterable[str]) -> Any:
            new = {name: change(getattr(part, name)) for name in names}
            return replace(part, **new)

        return replace(
            changed(self, ("projection", "pos_conv")),
            convs=tuple(changed(stage, ("conv",)) for stage in self.convs),
            blocks=tuple(changed(b, _BLOCK_LAYERS) for b in self.blocks),
        )

    def conv_geometry(self) -> list[tuple[int, int]]:
        convs = [stage.conv for stage in self.convs]
        return [(conv.weight.shape[-1], conv.stride) for conv in convs]

    def frames(self, samples: int) -> int:
        return conv_frames(samples, self.conv_geometry())


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
        self.names = {m: f"{path}.{n}" for n, m in model.named_modules()}

    def layer(self, module: nn.Module, kind: type[nn.Module]) -> AnyLayer:
        name = self.names[module]
        _check_plain(module, kind, name)
        found = self.integers.get(name)
        return float_layer(name, module) if found is None else found

    def norm(self, module: nn.Module | None) -> Norm | None:
        if module is None:
            return None
        where = self.names[module]
        over_time = isinstance(module, nn.GroupNorm)
        if not over_time:
            _check_plain(module, nn.LayerNorm, where)
        elif module.num_groups != module.num_channels:
            groups, channels = module.num_groups, module.num_channels
            what = f"GroupNorm with {groups} groups of {channels} channels"
            raise _unsupported(where, what)
        if module.weight is None or module.bias is None:
            raise _unsupported(where, "a normalization without weight and bias")
        weight, bias = module.weight.detach(), module.bias.detach()
        return Norm(weight.float(), bias.float(), module.eps, over_time)

    def conv(self, stage: nn.Module) -> ConvSpec:
        _check_gelu(stage.activation, f"{self.path}.feature_extractor")
        norm = self.norm(getattr(stage, "layer_norm", None))
        conv = self.layer(stage.conv, nn.Conv1d)
        if norm is not None and norm.over_time:
            # Every call reads its weight, see runtimes/group_norm.py.
            conv = conv.loaded()
        return ConvSpec(conv, norm)

    def block(self, block: nn.Module) -> BlockSpec:
        where = f"{self.path}.encoder.layers"
        if getattr(block, "adapter_layer", None) is not None:
            raise _unsupported(where, "an attention adapter")
        if hasattr(block.attention, "gru_rel_pos_linear"):
            raise _unsupported(where, "WavLM's relative position")
        activation = block.feed_forward.intermediate_act_fn
        _check_gelu(activation, f"{self.path}.feed_forward")
        layers = {
            name: self.layer(block.get_submodule(part), nn.Linear)
            for name, part in _BLOCK_LAYERS.items()
        }
        norms = self.norm(block.layer_norm), self.norm(block.final_layer_norm)
        return BlockSpec(norm1=norms[0], norm2=norms[1], **layers)

    def encoder(self, model: nn.Module) -> EncoderSpec:
        encoder, projection = model.encoder, model.feature_projection
        position = encoder.pos_conv_embed
        if getattr(model, "adapter", None) is not None:
            raise _unsupported(
                f"{self.path}.adapter", "a convolutional adapter"
            )
        _check_gelu(position.activation, f"{self.path}.pos_conv_embed")
        if getattr(position, "batch_norm", None) is not None:
            raise _unsupported(
                f"{self.path}.encoder.pos_conv_embed", "batch norm"
            )
        pre_norm = bool(model.config.do_stable_layer_norm)
        rotation = rotation_of(encoder)
        if rotation is not None and not pre_norm:
            raise ValueError(
                f"{self.path}.encoder: a rotated stream needs blocks that "
                "normalize before each sublayer (do_stable_layer_norm); leave "
                "that switch off"
            )
        return EncoderSpec(
            convs=tuple(map(self.conv, model.feature_extractor.conv_layers)),
            projection_norm=self.norm(getattr(projection, "layer_norm", None)),
            projection=self.layer(projection.projection, nn.Linear),
            pos_conv=self.layer(position.conv, nn.Conv1d),
            pos_trim=position.padding.num_pad_remove,
            norm=self.norm(encoder.layer_norm),
            blocks=tuple(map(self.block, encoder.layers)),
            num_heads=model.config.num_attention_heads,
            pre_norm=pre_norm,
            rotation=rotation,
        )


def describe_encoder(
    model: nn.Module, path: str, integers: Mapping[str, IntegerLayer]
) -> EncoderSpec:
    """Describes a HuggingFace encoder whose model is at ``path``.

    Raises ValueError for what the integer runtimes do not compute.
    Parameters of layers in ``integers`` are not read.
    """
    try:
        return _Reader(model, path, integers).encoder(model)
    except AttributeError as error:
        name = type(model).__name__
        raise _unsupported(path, f"{name} ({error})") from error


def check_encoders(modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError if the integer runtimes cannot compute an encoder."""
    for encoder in find_encoders(modules):
        _check_encoder(encoder)


def described_encoders(
    modules: Mapping[str, nn.Module],
    integers: Mapping[str, IntegerLayer] | None = None,
) -> list[Encoder]:
    """Returns the encoders that the integer runtimes compute as their own.

    ``integers``: layers whose weights may have left the modules.
    """
    found = []
    for encoder in find_encoders(modules):
        with suppress(ValueError):
            _check_encoder(encoder, integers)
            found.append(encoder)
    return found


def _check_encoder(
    encoder: Encoder, integers: Mapping[str, IntegerLayer] | None = None
) -> None:
    for owner, switch in (
        (encoder.wrapper, "output_all_hiddens"),
        (encoder.model.config, "output_hidden_states"),
    ):
        if getattr(owner, switch, False):
            raise ValueError(
                "backend: the integer runtimes give the last hidden state "
                f"only, and {switch} of '{encoder.key}' asks for all; "
                "write backend: torch"
            )
    try:
        describe_encoder(encoder.model, encoder.path, integers or {})
    except ValueError as error:
        raise ValueError(f"backend: {error}") from error
