"""Evaluations on the search set: resumed where exact, cached on disk."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ...core.layer_quant import LayerQuant
from ...model.layer import Cut
from ...simulation.prefix_cache import Replay
from ...utils.files import identity
from ...utils.store import Store
from ..search.divergence import Divergence
from ..search.journal import Journal
from ..search.score import BeforeBatch, Evaluate, Score, check_float_wer
from .block_cuts import called_once
from .histograms import HISTOGRAM_FILE, WHAT, Calibration
from .session import Session

logger = logging.getLogger(__name__)


def check_earlier_run(folder: Path) -> None:
    """Raises a ValueError that names a damaged file of an earlier run."""
    store = Store(folder)
    for file in store.names(f"{Path(HISTOGRAM_FILE).stem}*.json"):
        store.check(file, WHAT)
    Journal(store, "")


class SearchSet:
    """Evaluations of a session's recognizer on its search set."""

    def __init__(self, session: Session):
        self.session = session
        #: Those from a journal included.
        self.evaluations = 0
        self.journals: list[Journal] = []
        self._exact_cuts: list[Cut] | None = None
        self._divergence: Divergence | None = None
        #: Fingerprint of the model that the divergence compares with.
        self._reference = ""
        self._bar: tqdm | None = None
        self._steps = ""

    def keep_float_outputs(self) -> None:
        """Runs the unchanged float model over the search set, for divergences.

        Before rotation and equalization: a resumed run must compare with the
        same outputs as the run that was killed.
        """
        recognizer = self.session.recognizer
        with self.bar_of_one("float outputs", recognizer.ranked):
            self._divergence = Divergence(
                partial(recognizer.outputs, recognizer.ranked), self._started
            )
        self._reference = self.session.fingerprint()

    @contextmanager
    def bar(
        self, what: str, total: int, steps: str = "evaluations"
    ) -> Iterator[tqdm]:
        """Context of a progress bar over evaluations, over the ``batches`` of
        one, or over something else, which the context counts."""
        self._steps = steps
        with self.session.bar(total, f"search, {what}") as self._bar:
            yield self._bar
            if steps == "batches":
                # The last one has ended; none is run if a journal has them.
                self._bar.update(total - self._bar.n)
        self._bar = None

    def bar_of_one(
        self, what: str, subset: str = "search"
    ) -> AbstractContextManager[tqdm]:
        """Context of a progress bar over the batches of one evaluation."""
        return self.bar(what, self.session.batches(subset), "batches")

    def _started(self, index: int) -> None:
        """Notes that a batch begins."""
        if self._steps == "batches":
            self._bar.update(index - self._bar.n)

    def evaluator(
        self,
        weights: str,
        calibration: Calibration,
        metric: str | None = None,
    ) -> Evaluate:
        """The evaluate function of a search, within a :meth:`bar`.

        ``weights``: fingerprint of the model and of its simulator's tensors.
        ``metric``: ``"divergence"`` from :meth:`keep_float_outputs`, as a
        score's loss; by default the block's.
        """
        session = self.session
        search, recognizer = session.config.search, session.recognizer
        key, subset = [weights, metric or search.metric], "search"
        if metric == "divergence":
            subset, score_of = recognizer.ranked, self._divergence.score
            key += [self._reference, recognizer.key(subset, "outputs")]
        else:
            score_of = recognizer.score
            key.append(recognizer.key(subset, "scores"))
        journal = Journal(
            session.store,
            identity(key),
            metric is None and search.selection == "interval",
            metric or "wer",
        )
        self.journals.append(journal)
        replay = self._replay(calibration.in_order, metric != "divergence")

        measure = partial(self._measure, score_of, subset, replay)
        remembered = journal.wrap(measure)
        float_words: list[int] = []

        def counted(quants: Mapping[str, LayerQuant], **options) -> Score:
            score = remembered(quants, **options)
            self.evaluations += 1
            if self._steps == "evaluations":
                self._bar.update(1)
            if not quants:
                if metric != "divergence":
                    limit, rate = search.max_float_wer, recognizer.rate
                    check_float_wer(score.wer, "the search set", limit, rate)
                float_words.append(score.words)
            elif not score.complete:
                # Errors so far over all words: a lower bound of the WER.
                score = replace(score, words=float_words[0])
            return score

        return counted

    def _measure(
        self,
        score_of: Callable[[BeforeBatch, int | None], Score],
        subset: str,
        replay: Replay,
        quants: Mapping[str, LayerQuant],
        start: str | None,
        give_up_above: int | None,
        label: str,
    ) -> Score:
        """Evaluates; behind kept results if they are of the same prefix."""
        if self._steps != "batches":
            self._bar.set_postfix_str(label)
        session = self.session
        with session.simulator.apply(quants):
            if start is None or not replay.prepare(
                start,
                session.prefix(quants, start),
                partial(session.recognizer.forward, subset),
            ):
                return score_of(self._started, give_up_above)
            with replay.active():
                return score_of(replay.start_batch, give_up_above)

    def record(self, baseline: Score, final: Score) -> dict:
        """What a plan says of its search by any method: effort and WERs."""
        recognizer, rule = self.session.recognizer, {}
        if self.session.by_divergence:
            ranked = len(recognizer.ids(recognizer.ranked))
            rule = {"rule": "divergence", "ranking_utterances": ranked}
        return {
            "num_utterances": len(recognizer.ids("search")),
            "metric": recognizer.rate,
            **rule,
            "evaluations": self.evaluations,
            "baseline_wer": baseline.wer,
            "final_wer": final.wer,
        }

    def _replay(self, in_order: bool, counts_words: bool) -> Replay:
        session = self.session
        if self._exact_cuts is None:
            self._exact_cuts = _exact_cuts(session, session.cuts(in_order))
        cuts = self._exact_cuts
        if counts_words and session.recognizer.autoregressive:
            cuts = called_once(cuts, session.recognizer.score)
        return Replay(cuts, session.units, session.cache_bytes)


def _exact_cuts(session: Session, cuts: list[Cut]) -> list[Cut]:
    """Drops the cuts from which a replay is not exact.

    A model that reads more than the cut's output (all hidden states, for
    instance) gives another result for the first batch.
    """
    if not cuts or len(session.encoders) != 1:
        return cuts
    first = partial(session.recognizer.forward, "search", first_only=True)
    expected = first(lambda _: None)
    good = []
    for cut in cuts:
        trial = Replay([cut], session.units, session.cache_bytes)
        if trial.prepare(cut.unit, {}, first):
            with trial.active():
                again = first(trial.start_batch)
            if not torch.equal(again, expected):
                logger.warning(
                    "search: activations before %s cannot be reused exactly "
                    "and are computed each time",
                    cut.unit,
                )
                continue
        good.append(cut)
    return good
