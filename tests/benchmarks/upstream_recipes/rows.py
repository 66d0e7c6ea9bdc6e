"""The rows of ``upstream.py``, read from ``rows.yaml``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import corpora

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


_FILE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
#: Overrides of all recipes that have these keys.
COMMON: dict[str, Any] = _FILE["common"]
ROWS = {name: Row(**row) for name, row in _FILE["rows"].items()}
