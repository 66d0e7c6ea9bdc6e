"""The skeleton of an encoder: its parameters without the code that computes.

The integer runtimes compute an encoder themselves. The modules here have
transformers' names; importing its own code takes seconds and 150 MB.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..utils.patching import on_meta

_KINDS = ("wav2vec2", "hubert")

_DEFAULTS = {
    **dict.fromkeys(("add_adapter", "conv_pos_batch_norm"), False),
    "adapter_attn_dim": None,
}
#: Values that a configuration must have.
_PLAIN = {
    **dict.fromkeys(("hidden_act", "feat_extract_activation"), "gelu"),
    **_DEFAULTS,
}
_NEEDED = (
    *("conv_bias", "conv_dim", "conv_kernel", "conv_stride"),
    *("do_stable_layer_norm", "feat_extract_norm", "hidden_size"),
    *("intermediate_size", "layer_norm_eps", "mask_feature_prob"),
    *("mask_time_prob", "num_attention_heads", "num_conv_pos_embeddings"),
    *("num_conv_pos_embedding_groups", "num_hidden_layers"),
)


class _Part(nn.Module):
    def __init__(self, **children: Any):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def _extractor(config: Mapping[str, Any]) -> nn.Module:
    stages, bias = nn.ModuleList(), config["conv_bias"]
    shapes = (config[f"conv_{key}"] for key in ("dim", "kernel", "stride"))
    width = 1
    for out, kernel, stride in zip(*shapes, strict=True):
        conv = nn.Conv1d(width, out, kernel, stride, bias=bias)
        stage = _Part(conv=conv, activation=nn.GELU())
        if config["feat_extract_norm"] == "layer":
            stage.layer_norm = nn.LayerNorm(out)
        elif not stages:
            stage.layer_norm = nn.GroupNorm(out, out)
        stages.append(stage)
        width = out
    return _Part(conv_layers=stages)


def _block(config: Mapping[str, Any]) -> nn.Module:
    width, inner = config["hidden_size"], config["intermediate_size"]
    eps = config["layer_norm_eps"]
    projections = ("k_proj", "v_proj", "q_proj", "out_proj")
    return _Part(
        attention=_Part(**{n: nn.Linear(width, width) for n in projections}),
        layer_norm=nn.LayerNorm(width, eps),
        feed_forward=_Part(
            intermediate_dense=nn.Linear(width, inner),
            intermediate_act_fn=nn.GELU(),
            output_dense=nn.Linear(inner, width),
        ),
        final_layer_norm=nn.LayerNorm(width, eps),
    )


def _transformer(config: Mapping[str, Any]) -> nn.Module:
    width, kernel = config["hidden_size"], config["num_conv_pos_embeddings"]
    geometry = {"padding": kernel // 2}
    geometry["groups"] = config["num_conv_pos_embedding_groups"]
    position = _Part(
        conv=nn.Conv1d(width, width, kernel, **geometry),
        padding=SimpleNamespace(num_pad_remove=1 - kernel % 2),
        activation=nn.GELU(),
    )
    blocks = [_block(config) for _ in range(config["num_hidden_layers"])]
    norm = nn.LayerNorm(width, config["layer_norm_eps"])
    return _Part(
        pos_conv_embed=position, layer_norm=norm, layers=nn.ModuleList(blocks)
    )


class EncoderSkeleton(nn.Module):
    """The modules of an encoder, with :func:`folded_norms`."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.config = SimpleNamespace(**config)
        features, width = config["conv_dim"][-1], config["hidden_size"]
        self.feature_extractor = _extractor(config)
        self.feature_projection = _Part(projection=nn.Linear(features, width))
        if config.get("feat_proj_layer_norm", True):
            self.feature_projection.layer_norm = nn.LayerNorm(
                features, config["layer_norm_eps"]
            )
        if config["mask_time_prob"] > 0 or config["mask_feature_prob"] > 0:
            # Used in training only, but a parameter of the model.
            self.masked_spec_embed = nn.Parameter(torch.empty(width))
        self.encoder = _transformer(config)


def has_skeleton(config: Mapping[str, Any]) -> bool:
    """Whether :class:`EncoderSkeleton` represents a ``config.json``."""
    config = {**_DEFAULTS, **config}
    return (
        config.get("model_type") in _KINDS
        and all(key in config for key in _NEEDED)
        and config["feat_extract_norm"] in ("group", "layer")
        and all(config.get(key) == value for key, value in _PLAIN.items())
    )


def empty_skeleton(config: Mapping[str, Any]) -> EncoderSkeleton:
    """A skeleton without storage, on the ``meta`` device."""
    with on_meta():
        return EncoderSkeleton(config).eval()


def folded_norms(
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Weights in place of the parts of their weight norms."""
    out = dict(tensors)
    length, direction = (f".parametrizations.weight.original{i}" for i in "01")
    for name in tensors:
        if name.endswith(length):
            layer = name.removesuffix(length)
            parts = out.pop(f"{layer}{direction}"), out.pop(name)
            out[f"{layer}.weight"] = torch._weight_norm(*parts, 2)
    return out
