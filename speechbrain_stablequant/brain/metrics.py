"""SpeechBrain's word error statistics of a Brain, across processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import speechbrain as sb

from ..core.error_rates import Transcript
from ..utils.distributed import gathered


def metric_of(brain: sb.Brain, attribute: str) -> Any:
    """A Brain's ErrorRateStats; exists once ``on_stage_start`` was called."""
    metric = getattr(brain, attribute, None)
    if metric is None or not hasattr(metric, "scores"):
        stats = [
            name
            for name, value in vars(brain).items()
            if hasattr(value, "scores") and hasattr(value, "summarize")
        ]
        raise ValueError(
            f"quantize.metric_attribute: the Brain has no ErrorRateStats "
            f"'{attribute}'; it has {', '.join(stats) or 'none'}"
        )
    return metric


@dataclass(frozen=True)
class Row:
    """An utterance as the recipe's metric scored it: tokens are its words,
    or its labels."""

    id: str
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]


def rows_of(metric: Any) -> list[Row]:
    """The utterances that a metric has collected."""
    return [
        Row(
            str(row["key"]),
            tuple(str(token) for token in row["ref_tokens"]),
            tuple(str(token) for token in row["hyp_tokens"] if token != ""),
        )
        for row in metric.scores
    ]


def transcripts_of(metric: Any) -> list[Transcript]:
    """References and hypotheses that a metric has collected, as text."""
    return [
        Transcript(row.id, " ".join(row.reference), " ".join(row.hypothesis))
        for row in rows_of(metric)
    ]


def join_rows(rows: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """Rows of all processes in batch order; ``counts``: rows per batch."""
    mine = iter(rows)
    batches = [list(islice(mine, count)) for count in counts]
    return [
        row
        for turn in zip_longest(*gathered(batches), fillvalue=[])
        for batch in turn
        for row in batch
    ]


def join_metric(metric: Any, counts: Sequence[int]) -> None:
    """Collect the scores of all processes in each process's metric."""
    rows = metric.scores[len(metric.scores) - sum(counts) :]
    metric.scores = join_rows(rows, counts)
    metric.ids = [row["key"] for row in metric.scores]
