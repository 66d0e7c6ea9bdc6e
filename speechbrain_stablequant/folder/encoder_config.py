"""Reads an encoder's ``config.json``, from which its modules are made.

transformers believes what a configuration says, down to whose code computes
the attention. Here sizes are checked, and only what describes the model is
kept.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..utils.files import read_json
from ..utils.typed import one_line, short, typed
from .weights_file import CheckpointError

CONFIG_FILE = "config.json"
#: Families of encoders that take in a waveform.
KINDS = (
    *("wav2vec2", "hubert", "wavlm", "data2vec-audio"),
    *("wav2vec2-conformer", "unispeech", "unispeech-sat", "sew", "sew-d"),
)
# Of every encoder here; types of the rest depend on the family.
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
# What decides which code runs, or names places: never taken from a file.
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
    """Reads and checks a configuration.

    Arguments
    ---------
    path : Path
        A ``config.json``.
    tensors : int
        Number of tensors of the model's file: no model has more layers.

    Returns
    -------
    dict
        What describes the model.

    Raises
    ------
    CheckpointError
        Names the first key whose value is impossible.
    """
    try:
        raw = read_json(path, "encoder configuration")
        return check_config(raw, tensors)
    except ValueError as error:
        text = one_line(error, 400)
        where = "" if str(path) in text else f"{path}: "
        raise CheckpointError(f"{where}{text}; copy or make it again") from None


def check_config(raw: Any, tensors: int = _MAX_ITEMS) -> dict[str, Any]:
    """Checks the content of a ``config.json``.

    Arguments
    ---------
    raw : Any
        From JSON.
    tensors : int
        As of :func:`read_config`.

    Returns
    -------
    dict
        What describes the model.

    Raises
    ------
    ValueError
        Names the first key whose value is impossible.

    Example
    -------
    >>> check_config({"model_type": "hubert", "hidden_size": "large"})
    Traceback (most recent call last):
    ValueError: hidden_size: must be int, not 'large'
    """
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
    """No number or list is larger than those of models are."""
    values = value if isinstance(value, list) else [value]
    if len(values) > _MAX_ITEMS or any(
        isinstance(v, int | float) and abs(v) > _MAX_SIZE for v in values
    ):
        raise ValueError(f"{key}: cannot be {short(value)}")


def _check_shape(config: Mapping[str, Any]) -> None:
    """Sizes must be positive and belong together, as far as they are there."""

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
    """A HuggingFace model without storage.

    Arguments
    ---------
    config : Mapping
        Content of its ``config.json``.

    Returns
    -------
    torch.nn.Module
        On the ``meta`` device, in evaluation mode.

    Raises
    ------
    CheckpointError
        A model that this version of transformers does not know.
    """
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
        # Neither the library nor the configuration is ours.
        raise CheckpointError(
            f"{CONFIG_FILE}: transformers cannot make the {kind} model that "
            f"it describes ({one_line(error)}); copy or make it again"
        ) from error
