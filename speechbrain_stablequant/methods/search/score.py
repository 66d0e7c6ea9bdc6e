"""What one evaluation on the search set gives."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from ...core.plan import LayerQuant
from ...utils.typed import typed


@dataclass(frozen=True)
class Score:
    """Result of one evaluation on the search set.

    Arguments
    ---------
    errors, words : int
        Word errors and reference words.
    loss : float
        Secondary metric: the recipe's mean loss per utterance; one that is
        not finite counts as infinite.
    complete : bool
        False when the evaluation was given up because it could not win any
        more: ``errors`` is then a lower bound over the same ``words``.
    utterance_errors, utterance_words : tuple of int
        The same by utterance, in the order of the set, so that two scores of
        the same set can be compared in pairs; empty where that is not known.
    batch_losses : tuple of float
        The loss of each batch; empty where one is not finite.

    Example
    -------
    >>> Score(errors=1, words=4, loss=0.5).wer
    25.0
    """

    errors: int
    words: int
    loss: float
    complete: bool = True
    utterance_errors: tuple[int, ...] = ()
    utterance_words: tuple[int, ...] = ()
    batch_losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        # Losses are compared: NaN would make the order depend on chance.
        if not math.isfinite(self.loss):
            object.__setattr__(self, "loss", math.inf)
        if not all(map(math.isfinite, self.batch_losses)):
            object.__setattr__(self, "batch_losses", ())

    @property
    def wer(self) -> float:
        """Word error rate in percent."""
        return 100.0 * self.errors / self.words

    def to_dict(self) -> dict:
        """JSON-safe; a loss that is not finite becomes None, and what is
        empty is left out."""
        raw = {k: v for k, v in asdict(self).items() if v != ()}
        if not math.isfinite(self.loss):
            raw["loss"] = None
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping) -> "Score":
        """The inverse of :meth:`to_dict`."""
        rows = typed(raw, dict, "score")
        for name in ("loss", "complete"):
            if name not in rows:
                raise ValueError(f"score: lacks '{name}'")
        endless = rows["loss"] is None
        found = typed({**rows, "loss": 0.0} if endless else rows, cls, "score")
        if min(found.errors, found.words - 1) < 0:
            raise ValueError("score: has no words, or fewer than no errors")
        return replace(found, loss=math.inf) if endless else found


class Evaluate(Protocol):
    """Measures the recognizer with some layers quantized."""

    def __call__(
        self,
        quants: Mapping[str, LayerQuant],
        start: str | None = None,
        give_up_above: int | None = None,
        label: str = "",
    ) -> Score:
        """Measures.

        Arguments
        ---------
        quants : Mapping
            LayerQuant by layer name; all others are float.
        start : str or None
            First unit that differs from what was measured before: a hint
            that lets an implementation reuse the results of earlier units.
        give_up_above : int or None
            Word errors beyond which the exact result no longer matters.
        label : str
            For the journal and the progress bar.

        Returns
        -------
        Score
        """


def check_float_wer(wer: float, name: str, limit: float) -> None:
    """Raises where the float model recognizes too little.

    Arguments
    ---------
    wer : float
        Of the float model, in percent.
    name : str
        The set.
    limit : float
        ``quantize.search.max_float_wer``.

    Raises
    ------
    ValueError
        It is above the limit.

    Example
    -------
    >>> check_float_wer(5.0, "test set 'clean'", 90.0)
    """
    if wer > limit:
        raise ValueError(
            f"quantize: the float model's WER on {name} is {wer:.2f} %, above "
            f"quantize.search.max_float_wer ({limit:g}); check the checkpoint,"
            " the transcripts and quantize.metric_attribute, or raise the limit"
        )
