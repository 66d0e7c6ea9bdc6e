"""The result of one evaluation on the search set."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from ...core.layer_quant import LayerQuant
from ...utils.typed import typed

BeforeBatch = Callable[[int], None]


def finite(loss: float) -> float | None:
    """A loss as JSON, which has no infinity."""
    return loss if math.isfinite(loss) else None


@dataclass(frozen=True)
class Score:
    """Result of one evaluation on the search set.

    ``errors``: word errors among ``words`` reference words; a lower bound if
    the evaluation gave up early (not ``complete``). ``loss``: mean loss of the
    recipe per utterance, infinite if it is not finite. The rest, for paired
    comparison, is empty if unknown or not finite.
    """

    errors: int
    words: int
    loss: float
    complete: bool = True
    utterance_errors: tuple[int, ...] = ()
    utterance_words: tuple[int, ...] = ()
    batch_losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        # NaN would make comparisons depend on their order.
        if not math.isfinite(self.loss):
            object.__setattr__(self, "loss", math.inf)
        if not all(map(math.isfinite, self.batch_losses)):
            object.__setattr__(self, "batch_losses", ())

    @property
    def wer(self) -> float:
        return 100.0 * self.errors / self.words

    @property
    def lacks_utterances(self) -> bool:
        """Whether a whole set was counted, but not by utterance."""
        return self.complete and not self.utterance_errors

    def to_dict(self) -> dict:
        """JSON-safe: an infinite loss is None, empty fields are left out."""
        raw = {k: v for k, v in asdict(self).items() if v != ()}
        return {**raw, "loss": finite(self.loss)}

    @classmethod
    def from_dict(cls, raw: Mapping) -> "Score":
        """The inverse of :meth:`to_dict`; raises a ValueError if damaged."""
        rows = typed(raw, dict, "score")
        for name in ("loss", "complete"):
            if name not in rows:
                raise ValueError(f"score: lacks '{name}'")
        endless = rows["loss"] is None
        found = typed({**rows, "loss": 0.0} if endless else rows, cls, "score")
        if min(found.errors, found.words - 1) < 0:
            raise ValueError(
                "score: has no words, or a negative number of errors"
            )
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
        """Measures. ``start``, the first unit that differs from previous
        evaluations, is a hint to reuse the activations of earlier ones; above
        ``give_up_above`` word errors it may give up; ``label`` is for the
        journal and the progress bar."""


def check_float_wer(
    wer: float, name: str, limit: float, rate: str = "WER"
) -> None:
    """Raises if the float model's error rate (``rate``) is above the limit."""
    if wer > limit:
        raise ValueError(
            f"quantize: the float model's {rate} on {name} is {wer:.2f} %, "
            f"above quantize.search.max_float_wer ({limit:g}); check the "
            "checkpoint, the transcripts and quantize.metric_attribute, or "
            "raise the limit"
        )
