"""Finished evaluations on disk, so that a killed run resumes."""

from collections.abc import Mapping

from ...core.plan import LayerQuant
from ...utils.distributed import from_main
from ...utils.files import identity
from ...utils.store import Store
from .score import Evaluate, Score


def evaluation_key(
    fingerprint: str,
    quants: Mapping[str, LayerQuant],
    give_up_above: int | None = None,
) -> str:
    """Identifies an evaluation by all that decides its result."""
    content = {name: quant.to_dict() for name, quant in quants.items()}
    return identity([fingerprint, content, give_up_above])


class Journal:
    """Finished evaluations, one JSON line each, so that a killed run resumes.

    Arguments
    ---------
    store : Store
        Where the file is.
    file : str
        Its name, usually ``search.jsonl``.
    fingerprint : str
        Of the float model, the search set and its metric; lines of other
        fingerprints are kept, but not used.
    by_utterance : bool
        Whether to ignore complete lines without counts by utterance, which
        earlier versions wrote.
    """

    def __init__(
        self,
        store: Store,
        file: str,
        fingerprint: str,
        by_utterance: bool = False,
    ):
        self.store = store
        self.file = file
        self.fingerprint = fingerprint
        self.by_utterance = by_utterance
        self.measured = 0
        self.reused = 0
        self._scores = self._read()

    def _read(self) -> dict[str, Score]:
        scores = {}
        rows = self.store.rows(self.file)
        for number, row in enumerate(rows, start=1):
            try:
                scores[row["key"]] = Score.from_dict(row["score"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self.store.damaged_row(self.file, number) from error
        return scores

    def _serves(self, score: Score) -> bool:
        counted = score.utterance_errors or not score.complete
        return bool(counted) or not self.by_utterance

    def _append(self, key: str, label: str, score: Score) -> None:
        row = {"key": key, "label": label, "wer": round(score.wer, 4)}
        row["score"] = score.to_dict()
        self.store.append(self.file, row)

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
            if known is not None and self._serves(known):
                self.reused += 1
                return known
            score = evaluate(quants, start, give_up_above, label)
            self._scores[key] = score
            self.measured += 1
            self._append(key, label, score)
            return score

        return remembered
