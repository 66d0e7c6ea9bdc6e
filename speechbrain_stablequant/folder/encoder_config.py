"""Reads an encoder's ``config.json`` and builds its modules without storage.

transformers trusts a configuration, including whose code computes the
attention. Here sizes are checked, and only what describes the model is kept.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..utils.files import read_json
from ..utils.typed import one_line, short, typed
from .errors import CheckpointError

CONFIG_FILE = "config.json"
#: Encoder families that take a waveform.
KINDS = (
    *("wav2vec2", "hubert", "wavlm", "data2vec-audio"),
    *("wav2vec2-conformer", "unispeech", "unispeech-sat", "sew", "sew-d"),
)
# Keys that all families share.
_TYPES: dict[str, Any] = {
    "activation_dropout": float,
    "attention_dropout": float,
    "conv_bias": bool,
    "conv_dim": list[int],
    "conv_kernel": list[int],
    "conv_stride": list[int],
    "do_stable_layer_norm": bool,
    "feat_extract_activation": str,
    "feat_extract_norm": str,
    "feat_proj_layer_norm": bool,
    "hidden_act": str,
    "hidden_dropout": float,
    "hidden_size": int,
    "intermediate_size": int,
    "layer_norm_eps": float,
    "mask_feature_prob": float,
    "mask_time_prob": float,
    "num_attention_heads": int,
    "num_conv_pos_embedding_groups": int,
    "num_conv_pos_embeddings": int,
    "num_hidden_layers": int,
    "vocab_size": int,
}
# Keys that select code or name places: never taken from a file.
_DROPPED = (
    "attn_implementation",
    "auto_map",
    "dtype",
    "experts_implementation",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)
_CONVOLUTIONS = ("conv_dim", "conv_kernel", "conv_stride")
_MAX_SIZE = 1 << 20
_MAX_ITEMS = 1024
_MAX_KERNEL = 1024


def read_config(path: Path, tensors: int) -> dict[str, Any]:
    """Reads and checks a ``config.json``.

    ``tensors`` is the number of tensors in the model's file: no model has more
    layers.
    """
    try:
        raw = read_json(path, "encoder configuration")
        return check_config(raw, tensors)
    except ValueError as error:
        text = one_line(error, 400)
        where = "" if str(path) in text else f"{path}: "
        raise CheckpointError(f"{where}{text}; copy or make it again") from None


def check_config(raw: Any, tensors: int = _MAX_ITEMS) -> dict[str, Any]:
    """Checks a parsed ``config.json`` and returns the keys that describe the
    model."""
    rows = typed(raw, dict, "the configuration")
    config = {
        key: value
        for key, value in rows.items()
        if not key.startswith("_") and key not in _DROPPED
    }
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ValueError(
            f"model_type: {short(kind)} is none of {', '.join(KINDS)}"
        )
    for key, value in config.items():
        typed(value, _TYPES.get(key, Any), key)
        _check_sizes(key, value)
        repeated = key.startswith("num_") and key.endswith("_layers")
        if repeated and isinstance(value, int) and value > tensors:
            raise ValueError(
                f"{key}: {short(value)} layers are more than the file has "
                "tensors"
            )
    _check_shape(config)
    return config


def _check_sizes(key: str, value: Any) -> None:
    """Refuses numbers and lists larger than those of models."""
    values = value if isinstance(value, list) else [value]
    if len(values) > _MAX_ITEMS or any(
        isinstance(v, int | float) and abs(v) > _MAX_SIZE for v in values
    ):
        raise ValueError(f"{key}: cannot be {short(value)}")


def _check_shape(config: Mapping[str, Any]) -> None:
    """Checks that the sizes are positive and fit each other."""

    def require(good: bool, key: str) -> None:
        if not good:
            raise ValueError(f"{key}: cannot be {short(config.get(key))}")

    for key in ("num_attention_heads", "num_conv_pos_embedding_groups"):
        width, parts = config.get("hidden_size"), config.get(key)
        if width is not None and parts is not None:
            require(parts > 0 and width % parts == 0, key)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        require(config.get(key, 1) > 0, key)
    require(
        0 < config.get("num_conv_pos_embeddings", 1) <= _MAX_KERNEL,
        "num_conv_pos_embeddings",
    )
    require(0 < config.get("layer_norm_eps", 1e-5) < 1, "layer_norm_eps")
    for key in ("mask_feature_prob", "mask_time_prob"):
        require(0 <= config.get(key, 0) <= 1, key)
    lists = [key for key in _CONVOLUTIONS if key in config]
    for key in lists:
        sizes, first = config[key], config[lists[0]]
        most = _MAX_SIZE if key == "conv_dim" else _MAX_KERNEL
        require(
            0 < len(sizes) == len(first) <= 64
            and all(0 < size <= most for size in sizes),
            key,
        )


def empty_encoder(config: Mapping[str, Any]) -> nn.Module:
    """Builds a Hugging Face model on the ``meta`` device, in evaluation
    mode."""
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
