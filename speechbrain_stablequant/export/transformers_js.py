"""For transformers.js, in Node and browsers: the files of HuggingFace's
Wav2Vec2ForCTC, and onnx/model_quantized.onnx."""

import json
from pathlib import Path
from typing import Any

from .model import Model, fenced

_CODE = """import { pipeline, env } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = "..";  // The folder that holds this one.
const kind = "automatic-speech-recognition";
const recognize = await pipeline(kind, "NAME", { dtype: "q8" });
// Float32Array, mono, RATE Hz; in a browser also a URL.
const { text } = await recognize(samples);"""

# The engine's names of special labels.
_BLANK, _UNKNOWN, _DELIMITER = "<pad>", "<unk>", "|"


def write(model: Model, folder: Path) -> str:
    """Write the folder; returns Markdown that shows its use."""
    (folder / "onnx").mkdir()
    model.write(
        folder / "onnx" / "model_quantized.onnx",
        names=("input_values", "logits"),
    )
    files = {
        "config.json": {
            "architectures": ["Wav2Vec2ForCTC"],
            "model_type": "wav2vec2",
            "pad_token_id": model.blank,
            "vocab_size": len(model.labels),
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "padding_value": 0.0,
            "sampling_rate": model.sample_rate,
            # Within the graph, where the model has it.
            "do_normalize": False,
            "return_attention_mask": False,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "pad_token": _BLANK,
            "unk_token": _UNKNOWN,
            "word_delimiter_token": _DELIMITER,
        },
        "tokenizer.json": _tokenizer(model),
    }
    for name, row in files.items():
        text = json.dumps(row, ensure_ascii=False, indent=1)
        (folder / name).write_text(f"{text}\n", encoding="utf-8")
    code = _CODE.replace("NAME", folder.name)
    return fenced("js", code.replace("RATE", str(model.sample_rate)))


def _tokenizer(model: Model) -> dict[str, Any]:
    """A tokenizer whose decoder collapses as CTC does."""
    labels = [x.replace(" ", _DELIMITER) for x in model.labels]
    labels[model.blank] = _BLANK
    if _UNKNOWN not in labels:
        labels.append(_UNKNOWN)
    added = [
        {"id": i, "content": x}
        for i, x in enumerate(labels)
        if x in (_BLANK, _UNKNOWN)
    ]
    # A special blank would be dropped before equal neighbors are joined.
    flags = ("special", "single_word", "lstrip", "rstrip", "normalized")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**x, **dict.fromkeys(flags, False)} for x in added],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": ""},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "CTC",
            "pad_token": _BLANK,
            "word_delimiter_token": _DELIMITER,
            "cleanup": True,
        },
        "model": {
            "type": "WordLevel",
            "vocab": {x: i for i, x in enumerate(labels)},
            "unk_token": _UNKNOWN,
        },
    }
