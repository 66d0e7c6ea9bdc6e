"""The rows of ``upstream.py``, read from ``rows.yaml``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import corpora
from .models import WIDTH

#: What the model writes for the text of an utterance, by corpus.
_TEXTS = {
    "aishell": corpora.han,
    "slurp": corpora.slurp_meaning,
    "timers": corpora.timers_meaning,
}


@dataclass(frozen=True)
class Row:
    """A recipe, what it is given.

    ``labels`` is what the number of outputs counts: ``chars`` of the texts
    and the blank (of a label encoder) or the unknown one (of SentencePiece),
    ``media`` for both, ``marked`` for marks of begin and end too, ``pieces``,
    or ``bert`` for a BERT tokenizer's.
    """

    recipe: str
    script: str
    yaml: str
    #: Function of ``corpora``.
    corpus: str
    #: Keys of `modules` that the block quantizes.
    target: list[str]
    #: Manifest of the test set, below the output folder.
    manifest: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    labels: str = "pieces"
    #: Key of the YAML: family of the model whose folder it names.
    models: Mapping[str, str] = field(default_factory=dict)
    #: What is not upstream's default beside sizes.
    note: str = ""

    @property
    def imitate(self) -> Callable[..., dict]:
        """Writes the corpus."""
        return getattr(corpora, self.corpus)

    @property
    def texts(self) -> Callable[[str], str]:
        """What the model writes for the text of an utterance."""
        return _TEXTS.get(self.corpus, str)


# Keys of `sizes` that a scale multiplies.
_WIDTHS = {
    *("d_model", "d_ffn", "csgu_linear_units", "joint_dim", "dec_dim"),
    *("rnn_neurons", "dnn_neurons", "dec_neurons", "attn_dim", "emb_size"),
    *("embedding_dim", "encoder_dim", "feats_dim", "wav2vec_output_dim"),
    "whisper_output_dim",
}


def scaled(sizes: Any, scale: int) -> Any:
    """Sizes of a model that many times wider, and three times as deep."""
    if scale == 1 or not isinstance(sizes, Mapping):
        return sizes
    result = {}
    for key, value in sizes.items():
        if key in _WIDTHS:
            value = value * scale
        elif key.endswith("_layers"):
            value = value * 3
        elif key == "input_shape":
            value = [*value[:-1], value[-1] * scale]
        result[key] = scaled(value, scale)
    # Of a transducer's output.
    if set(sizes) == {"input_size"} and sizes["input_size"] == WIDTH:
        result["input_size"] = WIDTH * scale
    return result


_FILE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
#: Overrides of all recipes that have these keys.
COMMON: dict[str, Any] = _FILE["common"]
ROWS = {name: Row(**row) for name, row in _FILE["rows"].items()}
