"""What a run measured, as data: evaluations, test sets, effort, execution."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ..core.error_rates import (
    Transcript,
    paired_delta,
    paired_interval,
    score,
)
from ..core.layer_quant import quants_json
from ..core.plan import QuantizationPlan
from ..utils.files import identity
from ..utils.store import Store
from ..utils.typed import typed

# Of stored evaluations; others are measured again.
_FORMAT = 2
# An interval over fewer batches would say nothing.
_FEWEST_TURNS = 3


def plan_key(plan: QuantizationPlan, *measured: Any) -> str:
    """Key of what was measured with a plan."""
    content = [plan.fingerprint, *measured, quants_json(plan.quants())]
    if plan.weight_only:
        content.append(plan.weight_only)
    if plan.tensors:
        content.append(plan.tensors.digest())
    if plan.parts:
        content.append([asdict(part) for part in plan.parts])
    return identity(content)


@dataclass(frozen=True)
class Counts:
    """What a metric of the recipe counted, by utterance."""

    rate: str  #: such as WER, CER or PER
    ids: Sequence[str]
    errors: Sequence[int]  #: substituted, deleted and inserted tokens
    tokens: Sequence[int]  #: tokens of the reference

    @property
    def percent(self) -> float | None:
        total = sum(self.tokens)
        return 100 * sum(self.errors) / total if total else None

    def compared(self, other: "Counts") -> dict:
        """The rates of a float and a quantized evaluation of a set."""
        row = {"rate": self.rate, "float": self.percent}
        row["quantized"] = other.percent
        errors = dict(zip(other.ids, other.errors, strict=True))
        if row["float"] is None or sorted(self.ids) != sorted(errors):
            return row
        extra = np.array([errors[name] for name in self.ids])
        extra -= np.array(self.errors)
        found = paired_interval(extra, np.array(self.tokens))
        row |= {"delta": found.delta, "delta_ci": [found.low, found.high]}
        return row


@dataclass(frozen=True)
class Turns:
    """Batches that both models recognized one right after the other, so that
    whatever else the machine did met both."""

    float: Sequence[float]  #: seconds of each batch
    quantized: Sequence[float]  #: likewise
    audio: Sequence[float]  #: duration of its utterances


@dataclass(frozen=True)
class Evaluation:
    transcripts: Sequence[Transcript]  #: in the order of the loader
    #: The inference folder's transcripts, where its decoder differs from the
    #: recipe's.
    folder: tuple[Transcript, ...] = ()
    audio: str = ""  #: digest of the audio and of its batching
    #: All metrics of the recipe, by attribute.
    counts: Mapping[str, Counts] = field(default_factory=dict)
    rate: str = "WER"  #: what the metric counts that the transcripts are from
    #: Of a quantized evaluation whose arithmetic is not simulated.
    turns: Turns | None = None

    def key(self, plan: QuantizationPlan, *execution: Any) -> str:
        """Key of the quantized evaluation, by how a plan is executed."""
        heard = [asdict(transcript) for transcript in self.transcripts]
        return plan_key(plan, _FORMAT, self.audio, heard, execution)

    def write(self, store: Store, file: str, key: str) -> None:
        store.write(file, key, asdict(self))

    @classmethod
    def read(cls, store: Store, file: str, key: str) -> "Evaluation | None":
        """Load what :meth:`write` stored under the same key, if anything."""
        parse = partial(typed, hint=cls, where="content")
        return store.read(file, key, "transcripts", parse)


@dataclass(frozen=True)
class SetResult:
    """Both evaluations of one test set, over the same utterances in order."""

    baseline: Evaluation
    quantized: Evaluation

    @classmethod
    def pair(cls, baseline: Evaluation, quantized: Evaluation) -> "SetResult":
        """Reorder the quantized evaluation as the float one."""
        by_id = {item.id: item for item in quantized.transcripts}
        ids = [item.id for item in baseline.transcripts]
        missing = [name for name in ids if name not in by_id]
        if missing or len(by_id) != len(ids):
            raise ValueError(
                "test set: the float and the quantized evaluation differ in "
                f"their utterances ({', '.join(missing[:3]) or 'more ran'}); "
                "the test loader must give the same set each time"
            )
        ordered = [by_id[name] for name in ids]
        by_id = {item.id: item for item in quantized.folder}
        folder = tuple(by_id[name] for name in ids) if by_id else ()
        return cls(
            baseline, replace(quantized, transcripts=ordered, folder=folder)
        )

    def to_dict(self) -> dict:
        before = self.baseline.transcripts
        after = self.quantized.transcripts
        wer = paired_delta(before, after)
        cer = paired_delta(before, after, unit="char")
        row = {
            "float": score(before).to_dict(),
            "quantized": score(after).to_dict(),
            "delta_wer": wer.delta,
            "delta_wer_ci": [wer.low, wer.high],
            "delta_cer": cer.delta,
            "delta_cer_ci": [cer.low, cer.high],
            "rate": self.baseline.rate,
        }
        if self.baseline.counts:
            row["metrics"] = {
                name: counts.compared(self.quantized.counts[name])
                for name, counts in self.baseline.counts.items()
                if name in self.quantized.counts
            }
        if self.baseline.folder or self.quantized.folder:
            # An evaluation without folder transcripts has the recipe's.
            row["folder"] = {
                "float": score(self.baseline.folder or before).to_dict(),
                "quantized": score(self.quantized.folder or after).to_dict(),
            }
        return row


def real_time_factors(
    results: Iterable[SetResult],
) -> dict[str, float | None]:
    """Seconds for a second of audio of both models, in their turns."""
    turns = _turns(results)
    audio = sum(turns.audio)
    pair = {"float": turns.float, "quantized": turns.quantized}
    return {k: sum(v) / audio if audio else None for k, v in pair.items()}


def speedup(results: Iterable[SetResult]) -> dict | None:
    """The float model's time over the quantized one's, with the 95 % interval
    of a bootstrap over the batches; None where too few took turns."""
    turns = _turns(results)
    if len(turns.audio) < _FEWEST_TURNS:
        return None
    found = paired_interval(np.array(turns.float), np.array(turns.quantized))
    return {
        "batches": len(turns.audio),
        "ratio": found.delta / 100,
        "ratio_ci": [found.low / 100, found.high / 100],
    }


def _turns(results: Iterable[SetResult]) -> Turns:
    """Those of all sets."""
    every = [x.quantized.turns for x in results if x.quantized.turns]
    return Turns(
        *(
            [x for turns in every for x in getattr(turns, name)]
            for name in ("float", "quantized", "audio")
        )
    )


@dataclass(frozen=True)
class Effort:
    #: Variants share calibration and evaluations: the first one pays for
    #: them. Time of killed runs is not included.
    seconds: float
    #: Counts by ``calibration``, ``search`` and ``train``, where used.
    utterances: Mapping[str, int]
    transcribed: Sequence[str] = ()  #: the sets whose transcripts were used

    def remembered(self, store: Store, file: str, key: str) -> "Effort":
        """The stored effort of the same plan; else store and return this."""
        parse = partial(typed, hint=Effort, where="content")
        known = store.read(file, key, "effort of a plan", parse)
        if known is None:
            store.write(file, key, asdict(self))
        return known or self


@dataclass(frozen=True)
class Execution:
    backend: str  #: the runtime
    float_dtype: str  #: storage type of everything that is not quantized
    size: int  #: bytes of ``model.safetensors``
    keys: Sequence[str] | None = None  #: keys of the stored modules; None: all
    #: Whether the runtime imitates integers in floating point.
    simulated: bool = False
    interface: str = "EncoderASR"  #: SpeechBrain's class for it
    #: Multiply-adds of one batch, see ``core.account``.
    products: Mapping[str, int] | None = None
