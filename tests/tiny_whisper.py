"""A tiny random Whisper checkpoint."""

from pathlib import Path

import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]


def _config() -> WhisperConfig:
    """Two blocks of width 16 on each side; the tokens are bytes."""
    end = 256 + SPECIAL.index("<|endoftext|>")
    return WhisperConfig(
        vocab_size=256 + len(SPECIAL),
        num_mel_bins=80,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_target_positions=128,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=256 + SPECIAL.index("<|startoftranscript|>"),
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def tiny_decoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return WhisperModel(_config()).decoder


def save_whisper(folder: Path) -> None:
    labels = [*bytes_to_unicode().values(), *SPECIAL]
    vocabulary = {label: index for index, label in enumerate(labels)}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(_config())
    model.half().save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    WhisperTokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
    ).save_pretrained(folder)
