"""SpeechBrain's error statistics of a Brain, across processes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import speechbrain as sb
from speechbrain.utils.metric_stats import ErrorRateStats, MetricStats

from ..config import DEFAULT_METRIC
from ..core.error_rates import Transcript
from ..report.results import Counts
from ..utils.distributed import gathered

# The error rate in an attribute's name, such as the PER in `per_metrics`.
_RATE = re.compile(r"(?:^|[^a-z])([a-z]{1,2}er)(?:$|[^a-z])")
# Of several metrics the first of these decides.
_ORDER = ("WER", "PER", "CER")


def rate_name(attribute: str, metric: Any) -> str:
    """What a metric counts, such as WER, CER or PER."""
    if getattr(metric, "split_tokens", False):
        return "CER"
    named = _RATE.search(attribute.lower())
    return named[1].upper() if named else "WER"


def error_metrics(brain: sb.Brain) -> dict[str, Any]:
    """A Brain's ErrorRateStats by attribute, also those in a dictionary, a list
    or ``hparams``; the one that decides by convention is the first."""
    found = {
        name: value
        for name, value in objects_of(brain)
        if isinstance(value, ErrorRateStats)
        # A class of the recipe's own.
        or (
            all(hasattr(value, key) for key in ("scores", "write_stats"))
            and not isinstance(value, MetricStats)
        )
    }

    def rank(name: str) -> tuple[bool, int]:
        rate = rate_name(name, found[name])
        known = rate in _ORDER
        place = _ORDER.index(rate) if known else len(_ORDER)
        return name != DEFAULT_METRIC, place

    return {name: found[name] for name in sorted(found, key=rank)}


def objects_of(brain: sb.Brain) -> Iterator[tuple[str, Any]]:
    """Attributes of a Brain, and what its containers hold, by name."""
    for name, value in vars(brain).items():
        yield name, value
        items: Any = ()
        if name == "hparams":
            items = vars(value).items()
        elif isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        for key, item in items:
            yield f"{name}.{key}", item


def metric_name(brain: sb.Brain, attribute: str) -> str:
    """Attribute of the metric that decides: the one that the block names; of
    the default's name none may exist, then the first one."""
    stats = error_metrics(brain)
    if attribute in stats:
        return attribute
    if not stats:
        others = [
            f"{name} ({type(value).__name__})"
            for name, value in objects_of(brain)
            if isinstance(value, MetricStats) or name.endswith("_metric")
        ]
        raise ValueError(
            "quantize.metric_attribute: the Brain has no ErrorRateStats after "
            "on_stage_start, and nothing else than an error rate of words, "
            "characters or phonemes can decide; it has "
            f"{', '.join(others) or 'no metric at all'}"
        )
    if attribute != DEFAULT_METRIC:
        raise ValueError(
            "quantize.metric_attribute: the Brain has no ErrorRateStats "
            f"'{attribute}'; it has {', '.join(stats)}"
        )
    return next(iter(stats))


def metric_of(brain: sb.Brain, attribute: str) -> Any:
    """The ErrorRateStats that decides; exists once ``on_stage_start`` was
    called."""
    return error_metrics(brain)[metric_name(brain, attribute)]


def rate_of(brain: sb.Brain, attribute: str) -> str:
    """What the metric that decides counts, such as WER."""
    name = metric_name(brain, attribute)
    return rate_name(name, error_metrics(brain)[name])


def counts_of(brain: sb.Brain) -> dict[str, Counts]:
    """Errors and reference tokens by utterance, of all metrics by name."""
    return {
        name: Counts(
            rate_name(name, metric),
            tuple(str(row["key"]) for row in metric.scores),
            tuple(int(row["num_edits"]) for row in metric.scores),
            tuple(int(row["num_ref_tokens"]) for row in metric.scores),
        )
        for name, metric in error_metrics(brain).items()
    }


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
