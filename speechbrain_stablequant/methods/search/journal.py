"""Finished evaluations on disk, so that a killed run resumes."""

from collections.abc import Mapping

from ...core.layer_quant import LayerQuant, quants_json
from ...utils.distributed import from_main
from ...utils.files import identity
from ...utils.store import Store
from .score import Evaluate, Score

JOURNAL_FILE = "search.jsonl"


def evaluation_key(
    fingerprint: str,
    quants: Mapping[str, LayerQuant],
    give_up_above: int | None = None,
) -> str:
    return identity([fingerprint, quants_json(quants), give_up_above])


class Journal:
    """Finished evaluations, one JSON line each.

    ``fingerprint`` identifies the float model, the search set and its metric.
    ``by_utterance``: whether to ignore complete lines without counts by
    utterance, which earlier versions wrote. ``rule``: what is measured, for
    the reader: ``wer`` or ``divergence``.
    """

    def __init__(
        self,
        store: Store,
        fingerprint: str,
        by_utterance: bool = False,
        rule: str = "wer",
    ):
        self.store = store
        self.fingerprint = fingerprint
        self.by_utterance = by_utterance
        self.rule = rule
        self.reused = 0  #: evaluations of earlier runs
        self._scores: dict[str, Score] = {}
        for number, row in enumerate(store.rows(JOURNAL_FILE), start=1):
            try:
                self._scores[row["key"]] = Score.from_dict(row["score"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise store.damaged_row(JOURNAL_FILE, number) from error
        self._earlier = frozenset(self._scores)

    def wrap(self, evaluate: Evaluate) -> Evaluate:
        """Evaluates unless the journal has the result."""

        def remembered(
            quants: Mapping[str, LayerQuant],
            start: str | None = None,
            give_up_above: int | None = None,
            label: str = "",
        ) -> Score:
            key = evaluation_key(self.fingerprint, quants, give_up_above)
            known = from_main(self._scores.get(key))
            if known and not (self.by_utterance and known.lacks_utterances):
                self.reused += key in self._earlier
                return known
            score = evaluate(quants, start, give_up_above, label)
            self._scores[key] = score
            row = {"key": key, "label": label, "rule": self.rule}
            if self.rule == "wer":
                row["wer"] = round(score.wer, 4)
            self.store.append(JOURNAL_FILE, {**row, "score": score.to_dict()})
            return score

        return remembered
