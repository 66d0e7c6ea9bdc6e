"""The files that make one of SpeechBrain's HuggingFace wrappers again."""

import json
import tempfile
from pathlib import Path

from torch import nn

TWO_WRAPPERS = (
    "{} are models of HuggingFace, and a folder holds the configuration of one"
)


def huggingface_files(wrapper: nn.Module) -> dict[str, bytes]:
    """What makes a wrapper of HuggingFace again, apart from weights."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("feature_extractor", "tokenizer"):
            part = getattr(wrapper, name, None)
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)
        files = {
            path.name: path.read_bytes()
            for path in sorted(Path(folder).iterdir())
            if path.is_file()
        }
    # Of Whisper's tokenizer, which does not save it.
    spelling = getattr(
        getattr(wrapper, "tokenizer", None), "english_spelling_normalizer", None
    )
    if spelling is not None:
        files["normalizer.json"] = json.dumps(spelling, indent=1).encode()
    config = wrapper.model.config.to_json_string(use_diff=False)
    files["config.json"] = config.encode()
    for name, content in files.items():
        if name.endswith(".json"):
            rows = json.loads(content)
            # A folder does not reveal where its model came from.
            for key in ("_name_or_path", "name_or_path"):
                if isinstance(rows, dict) and rows.pop(key, None) is not None:
                    text = json.dumps(rows, indent=1, ensure_ascii=False)
                    files[name] = text.encode()
    return files
