"""Reads and checks ``config.json``; builds the encoder without storage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..utils.files import parse_json, read_file
from ..utils.typed import one_line, short, typed
from .errors import CheckpointError, reading

CONFIG_FILE = "config.json"
#: Encoder families that take a waveform.
KINDS = (
    *("wav2vec2", "hubert", "wavlm", "data2vec-audio"),
    *("wav2vec2-conformer", "unispeech", "unispeech-sat", "sew", "sew-d"),
)
# Keys that all families share.
_FLOATS = (
    *("activation_dropout", "attention_dropout", "hidden_dropout"),
    *("layer_norm_eps", "mask_feature_prob", "mask_time_prob"),
)
_INTEGERS = (
    *("hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_hidden_layers"),
    *("num_conv_pos_embedding_groups", "num_conv_pos_embeddings"),
)
_CONVOLUTIONS = ("conv_dim", "conv_kernel", "conv_stride")
_TYPES: dict[str, Any] = {
    **dict.fromkeys(_FLOATS, float),
    **dict.fromkeys(_INTEGERS, int),
    **dict.fromkeys(_CONVOLUTIONS, list[int]),
    "conv_bias": bool,
    "do_stable_layer_norm": bool,
    "feat_extract_activation": str,
    "feat_extract_norm": str,
    "feat_proj_layer_norm": bool,
    "hidden_act": str,
}
# Keys that select code or name places: never taken from a file.
_DROPPED = (
    *("attn_implementation", "auto_map", "dtype", "experts_implementation"),
    *("quantization_config", "torch_dtype", "transformers_version"),
)
_MAX_SIZE = 1 << 20
_MAX_ITEMS = 1024
_MAX_CONVOLUTIONS = 64
_MAX_KERNEL = 1024
# Keys that divide the hidden size.
_DIVISORS = ("num_attention_heads", "num_conv_pos_embedding_groups")
# Least and largest values, of lists for each item.
_RANGES = {
    **dict.fromkeys((*_INTEGERS, *_CONVOLUTIONS), (1, _MAX_SIZE)),
    **dict.fromkeys(("conv_kernel", "conv_stride"), (1, _MAX_KERNEL)),
    "num_conv_pos_embeddings": (1, _MAX_KERNEL),
    "layer_norm_eps": (1e-30, 1),
    "mask_feature_prob": (0, 1),
    "mask_time_prob": (0, 1),
}


def read_config(path: Path, tensors: int) -> dict[str, Any]:
    """Reads a ``config.json``; no model has more layers than ``tensors``."""
    with reading(path, "describes no encoder"):
        return check_config(parse_json(read_file(path)), tensors)


def check_config(raw: Any, tensors: int = _MAX_ITEMS) -> dict[str, Any]:
    """Checks a ``config.json``; returns the keys that describe the model."""
    config = {
        key: value
        for key, value in typed(raw, dict, "the configuration").items()
        if not key.startswith("_") and key not in _DROPPED
    }
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ValueError(
            f"model_type: {short(kind)} is none of {', '.join(KINDS)}"
        )
    for key, value in config.items():
        typed(value, _TYPES.get(key, Any), key)
    for key, value in config.items():
        if not _is_possible(key, value, config):
            raise ValueError(f"{key}: cannot be {short(value)}")
        repeated = key.startswith("num_") and key.endswith("_layers")
        if repeated and isinstance(value, int) and value > tensors:
            raise ValueError(
                f"{key}: {short(value)} layers are more than the file has "
                "tensors"
            )
    return config


def _is_possible(key: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether sizes are within those of models, and fit each other."""
    values = value if isinstance(value, list) else [value]
    least, most = _RANGES.get(key, (-_MAX_SIZE, _MAX_SIZE))
    numbers = [v for v in values if isinstance(v, int | float)]
    if len(values) > _MAX_ITEMS or not all(least <= v <= most for v in numbers):
        return False
    if key in _DIVISORS:
        return config.get("hidden_size", 0) % value == 0
    if key in _CONVOLUTIONS:
        first = next(config[k] for k in _CONVOLUTIONS if k in config)
        return 0 < len(value) == len(first) <= _MAX_CONVOLUTIONS
    return True


def empty_encoder(config: Mapping[str, Any]) -> nn.Module:
    """Builds a Hugging Face model on ``meta``, in evaluation mode."""
    from transformers import CONFIG_MAPPING, AutoModel

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{CONFIG_FILE}: transformers knows no model_type {kind!r}; "
            "install the version that the folder was written with"
        )
    try:
        known = CONFIG_MAPPING[kind].from_dict(dict(config))
        with torch.device("meta"):
            return AutoModel.from_config(known, dtype=torch.float32).eval()
    except Exception as error:
        # Third-party code on an untrusted configuration may raise anything.
        raise CheckpointError(
            f"{CONFIG_FILE}: transformers cannot make the {kind} model that "
            f"it describes ({one_line(error)}); copy or make it again"
        ) from error
