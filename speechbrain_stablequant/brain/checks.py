"""What is checked before a search, from the first to the last.

When a Brain is made: its options, the block, the folder. In its evaluation: the
checkpoint; on one batch the inference folder and the recipe's decoding; on the
test set, after its float evaluation, the decoding, the characters that the
labels can write, and the WER.
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import speechbrain as sb
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2

from ..config import ConfigError
from ..core.error_rates import MOST_RECOGNIZED, score
from ..core.plan import QuantizationPlan
from ..folder.errors import NoFolderError
from ..folder.recognizer_spec import RecognizerSource
from ..folder.write import ModulesSource
from ..methods.search.score import check_float_wer
from ..methods.session.search_set import check_earlier_run
from ..model.layers import find_layers, visible_layers
from ..utils import distributed
from ..utils.files import check_writable_folder
from ..utils.patching import hooked
from ..utils.typed import one_line
from .block import run_configs
from .decoding import (
    SPACE,
    Finding,
    FolderDecoder,
    Tokenizer,
    describe_tokenizer,
    difference,
    find_tokenizer,
)
from .describe import describe_recognizer
from .generated import loading_class
from .metrics import Row, rate_of, rows_of, transcripts_of
from .passes import decoding_each_time, evaluation_steps, recognize
from .rebuilt import describe_modules

if TYPE_CHECKING:
    from ..methods.registry import QuantizeConfig
    from .run import Run

logger = logging.getLogger(__name__)

# Brain options that replace the modules to be quantized. The keys of modules
# that recipes name beside them do nothing alone.
_REPLACING = ("jit", "compile", "data_parallel_backend")

# Maximum percentage of reference words that labels cannot write.
_MOST_UNCOVERED = 50.0

_Text = tuple[str, ...]


def check_setting(brain: sb.Brain, config: "QuantizeConfig") -> Path:
    """Check what is known when a Brain is made; create the output folder.

    Rejects a Brain that is attached already or compiled, methods that need one
    process, plans that do not fit, and damaged files of an earlier run.
    """
    if hasattr(brain, "stablequant"):
        raise ValueError(
            "quantize: StableQuant is attached to this Brain already; "
            "attach it once, or use a YAML block without attach()"
        )
    for option in _REPLACING:
        if getattr(brain, option, None):
            raise ValueError(
                f"quantize: --{option} replaces modules that have to be "
                "quantized; run without it"
            )
    for variant in run_configs(config, brain.debug).values():
        _check_variant(brain, variant)
    folder = check_writable_folder(
        _output_folder(brain, config), "quantize.output_folder"
    )
    check_earlier_run(folder)
    return folder


def _check_variant(brain: sb.Brain, config: "QuantizeConfig") -> None:
    if config.needs_training and distributed.size() > 1:
        raise ConfigError(
            f"quantize.method: {config.method} runs in one process; start it "
            "with python instead of torchrun"
        )
    modules = dict(brain.modules.items())
    layers = find_layers(modules, config.target, config.include, config.exclude)
    if config.plan is not None:
        plan = QuantizationPlan.load(config.plan)
        plan.check_fits(layers, modules, config.plan)


def _output_folder(brain: sb.Brain, config: "QuantizeConfig") -> Path:
    if config.output_folder is not None:
        return Path(config.output_folder)
    base = getattr(brain.hparams, "output_folder", None)
    if base is None:
        raise ValueError(
            "quantize.output_folder: the recipe has no `output_folder`; "
            "name a folder here"
        )
    return Path(base) / "quantized"


def check_checkpoint(
    brain: sb.Brain, max_key: str | None, min_key: str | None
) -> None:
    """Raise if a Brain's checkpointer finds no checkpoint."""
    checkpointer = brain.checkpointer
    if checkpointer is None or brain.debug:
        return
    found = checkpointer.find_checkpoint(max_key=max_key, min_key=min_key)
    if found is None:
        raise FileNotFoundError(
            f"no checkpoint in {checkpointer.checkpoints_dir}: train "
            "first, or set quantize.require_checkpoint to false if the "
            "weights come from elsewhere"
        )


class RecipeChecks:
    """Checks what the recipe computes, and reports findings at once."""

    def __init__(
        self, brain: sb.Brain, config: "QuantizeConfig", runs: "Sequence[Run]"
    ):
        self.brain = brain
        self.config = config
        self.runs = runs
        self._decoder: FolderDecoder | None = None
        self._described: dict[tuple, tuple[ModulesSource, dict]] = {}

    def leave_out_idle(self, batch: Any) -> None:
        """Leave layers out of the runs that recognizing a batch never calls,
        such as a CTC head of the training alone."""
        runs = [run for run in self.runs if run.config.plan is None]
        layers = {x.name: x for run in runs for x in run.layers}
        called: set[str] = set()
        hooks = [
            (layer.module, lambda *_, name=name: called.add(name))
            for name, layer in layers.items()
        ]
        try:
            with (
                visible_layers(layers.values()),
                hooked(hooks),
                decoding_each_time(self.brain),
            ):
                recognize(self.brain, batch)
        except Exception as error:
            # The calibration raises the same.
            logger.debug("quantize: no batch in the VALID stage: %s", error)
            return
        for run in runs:
            idle = [x.name for x in run.layers if x.name not in called]
            if not idle or len(idle) == len(run.layers):
                continue
            exclude = (*run.config.exclude, *idle)
            run.config = replace(run.config, exclude=exclude)
            more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
            self.warn(
                [run],
                "Not quantized, since the recipe never calls them to "
                f"recognize: {', '.join(idle[:3])}{more}.",
            )

    def try_out(self, batch: Any) -> None:
        """Describe the inference folders and try the decoding on a batch."""
        for run in self.runs:
            try:
                run.source = self._describe(run, batch)
            except Exception as error:
                # A recipe without an inference folder is still evaluated.
                self.warn(
                    [run],
                    f"No inference folder ({loading_class(self.brain)} cannot "
                    f"load it): {one_line(error, 500)}.",
                )
        sources = [run.source for run in self.runs]
        sources = [x for x in sources if isinstance(x, RecognizerSource)]
        if sources:
            self._try_decoder(batch, sources[0])

    def _describe(
        self, run: "Run", batch: Any
    ) -> RecognizerSource | ModulesSource:
        """Describe a run's folder; raise why there is none."""
        names = [layer.name for layer in run.layers]
        first = None
        if run.config.inference is None:
            try:
                found = describe_recognizer(
                    self.brain, batch, run.config, names
                )
                # What reads that folder does not know parts.
                if not run.parts:
                    return found
            except Exception as error:
                first = error
        # Variants of the same modules have the same folder.
        keys = (run.config.inference, *sorted({n.split(".")[0] for n in names}))
        try:
            if keys not in self._described:
                self._described[keys] = describe_modules(
                    self.brain, batch, run.config, names
                )
        except Exception as error:
            # A recipe around HuggingFace's encoder is told what is unusual.
            parts = self.brain.modules.values()
            hub = any(isinstance(x, Wav2Vec2) for x in parts)
            if hub and first and str(first) != str(error):
                raise NoFolderError(f"{first}; {error}") from error
            raise
        source, modules = self._described[keys]
        own = run.modules
        run.extras = {k: m for k, m in modules.items() if k not in own}
        return source

    def _try_decoder(self, batch: Any, source: RecognizerSource) -> None:
        decoder = FolderDecoder(
            self.brain.modules[source.keys[-1]],
            find_tokenizer(self.brain),
            source.blank_index,
            self.config.signal,
        )
        self._decoder = decoder
        attribute = self.config.metric_attribute
        try:
            with decoder.listening(self.brain) as texts:
                ((_, metric, _),) = evaluation_steps(
                    self.brain, [batch], sb.Stage.TEST, attribute
                )
        except Exception as error:
            # The recipe's own evaluation comes next, and raises the same.
            logger.debug("quantize: no batch in the TEST stage: %s", error)
            return
        self.compare(metric, texts, self.runs)
        # The whole set, which has more words, is checked after its float
        # evaluation; what would be refused then is refused now.
        tokenizer, rows = find_tokenizer(self.brain), rows_of(metric)
        check_references(rows, tokenizer, "the test set", self._limit)

    def listening(self) -> AbstractContextManager[list[_Text]]:
        """Transcribe batches with the folder's decoder, if there is one."""
        if self._decoder is None:
            return nullcontext([])
        return self._decoder.listening(self.brain)

    def compare(
        self, metric: Any, texts: Sequence[_Text], runs: "Sequence[Run]"
    ) -> list[_Text]:
        """Warn if recipe and folder decode differently; return the folder's
        transcripts, with spaces where the recipe has them."""
        if self._decoder is None or len(texts) != len(metric.scores):
            return []
        rows = rows_of(metric)
        texts = self._decoder.respelled(rows, texts)
        content = describe_tokenizer(self._decoder.tokenizer).content
        for run in self.runs:
            if isinstance(run.source, RecognizerSource):
                run.source = replace(run.source, tokenizer=content)
        found = difference(rows, texts)
        if found is not None:
            described = [
                run for run in runs if isinstance(run.source, RecognizerSource)
            ]
            self.warn(described, *found, once=found.text)
        return texts

    def check_baseline(
        self, metric: Any, texts: Sequence[_Text], name: str
    ) -> list[_Text]:
        """Check the float evaluation of a test set; return the folder's texts.

        Refuses references that the labels cannot write and a WER that is too
        high, but only while a search is still ahead.
        """
        texts = self.compare(metric, texts, self.runs)
        where = f"test set '{name}'"
        try:
            wer = score(transcripts_of(metric)).wer
        except ValueError as error:
            raise ValueError(f"quantize: {where}: {error}") from error
        first = all(run.plan is None for run in self.runs)
        rows, tokenizer = rows_of(metric), find_tokenizer(self.brain)
        limit = self._limit if first else 100.0
        found = check_references(rows, tokenizer, where, limit)
        if found is not None:
            self.warn(self.runs, *found)
        if first:
            rate = rate_of(self.brain, self.config.metric_attribute)
            check_float_wer(wer, where, self._limit, rate)
        if wer > MOST_RECOGNIZED:
            self.warn(
                self.runs,
                f"The float model recognizes next to nothing of {where}: error "
                "rates there say nothing about quantization.",
            )
        return texts

    @property
    def _limit(self) -> float:
        return max(run.config.search.max_float_wer for run in self.runs)

    def warn(
        self,
        runs: "Iterable[Run]",
        warning: str,
        example: str = "",
        once: str | None = None,
    ) -> None:
        """Log a warning with an example, and add it without to the reports of
        runs that have none which begins with ``once``."""
        more = f" For example, {example}." if example else ""
        for run in runs:
            if once and any(w.startswith(once) for w in run.warnings):
                continue
            if not any(warning in other.warnings for other in self.runs):
                logger.warning("quantize: %s%s", warning, more)
            run.warnings.append(warning)


def check_references(
    rows: Sequence[Row], tokenizer: Tokenizer | None, name: str, limit: float
) -> Finding | None:
    """A warning about reference words that the labels cannot write, or None.

    Raises if most words are such, unless ``limit``, the maximum float WER, is
    100 or more.
    """
    known = None if tokenizer is None else _written(tokenizer)
    heard = {c for row in rows for token in row.hypothesis for c in token}
    heard -= {SPACE, " "}
    # If no label yields what was recognized, the recipe postprocesses.
    if known is None or not heard or not heard <= known:
        return None
    known |= {SPACE, " "}
    words = [(row.id, token) for row in rows for token in row.reference]
    bad = [(who, set(word) - known) for who, word in words if set(word) - known]
    if not bad:
        return None
    first = bad[0][0]
    characters = set().union(*(unknown for who, unknown in bad if who == first))
    example = (
        f"utterance {first} has {''.join(sorted(characters))!r}, which no "
        "label of the recipe's tokenizer yields"
    )
    if 100 * len(bad) / len(words) > _MOST_UNCOVERED and limit < 100:
        raise ValueError(
            f"quantize: {name}: {example}, as {len(bad)} of {len(words)} words "
            "do; write the transcripts as the labels are written (case, "
            "punctuation), or set quantize.search.max_float_wer to 100 or more"
        )
    return Finding(
        f"Of the words of {name} {len(bad)} of {len(words)} cannot be "
        "recognized: no label of the recipe's tokenizer yields their "
        "characters.",
        example,
    )


def _written(tokenizer: Tokenizer) -> set[str] | None:
    """Characters of all labels; None if byte pieces can spell anything."""
    if isinstance(tokenizer, CTCTextEncoder):
        special = {
            getattr(tokenizer, f"{name}_label", None)
            for name in ("blank", "unk", "bos", "eos")
        }
        labels = [x for x in tokenizer.lab2ind if x not in special]
        return {c for label in labels for c in str(label)}
    ids = range(tokenizer.get_piece_size())
    if any(map(tokenizer.is_byte, ids)):
        return None
    pieces = [
        tokenizer.id_to_piece(i)
        for i in ids
        if not (tokenizer.is_control(i) or tokenizer.is_unknown(i))
    ]
    return {c for piece in pieces for c in piece.replace("\u2581", " ")}
