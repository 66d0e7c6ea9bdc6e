"""Progress and results in the recipe's own ``train_logger``."""

import inspect
import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import speechbrain as sb

from ..core.error_rates import score
from ..methods.search.score import Score
from ..report.results import real_time_factors
from ..utils import distributed
from ..utils.typed import one_line

if TYPE_CHECKING:
    from .run import Run

logger = logging.getLogger(__name__)


def log_search(brain: sb.Brain, number: int, found: Score) -> None:
    """Log one evaluation of the search set."""
    meta = {"quantize evaluation": number}
    _log(brain, meta, valid_stats={"search WER": found.wer})


def log_results(run: "Run", name: str) -> None:
    """Log the error rates of a test set, the size and the time."""
    result, execution = run.results[name], run.execution()
    plan, stats = run.plan, {}
    pair = {"float": result.baseline, "quantized": result.quantized}
    times = {} if execution.simulated else real_time_factors([result])
    for model, evaluation in pair.items():
        where = " ".join(filter(None, [name, run.name, model]))
        found = score(evaluation.transcripts).wer
        stats[f"{where} {result.baseline.rate}"] = found
        if times:
            stats[f"{where} real-time factor"] = times[model]
    stats[f"{where} MB"] = execution.size / 1e6
    meta = {
        "quantize weight bits": plan.weight_bits,
        "quantize activation bits": plan.activation_bits,
    }
    _log(run.brain, meta, test_stats=stats)


def _log(brain: sb.Brain, meta: Mapping, **stats: Mapping) -> None:
    """By the main process. TensorBoard takes numbers only, as ``meta`` too."""
    found = getattr(getattr(brain, "hparams", None), "train_logger", None)
    # Not imported, which warns where torchvision is not installed.
    known = sys.modules.get("speechbrain.utils.train_logger")
    if known is None or not isinstance(found, known.TrainLogger):
        return
    if not distributed.is_main():
        return
    # SpeechBrain's own decorator would wait for the other processes, which
    # are not here, or wait for this one in vain if it fails.
    log_stats = inspect.unwrap(type(found).log_stats)
    try:
        log_stats(found, dict(meta), **stats, verbose=False)
    except OSError as error:
        # A full disk does not end a search.
        logger.warning("train_logger: %s", one_line(error))
