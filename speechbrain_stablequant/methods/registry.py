"""Methods and their blocks: a line in ``METHODS``, one in ``hparams/``."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from typing import Any

from ..config import CommonConfig, MethodConfig
from ..core.calibrators import CALIBRATORS
from ..core.plan import QuantizationPlan
from ..utils.typed import choice
from .adaround import AdaRound, adaround_plan
from .calibrator import PercentileConfig, calibrator_plan
from .plus.config import PlusConfig
from .plus.plan import plus_plan
from .qat.config import QatConfig
from .qat.plan import qat_plan
from .session.calibration import calibrate
from .session.histograms import Calibration
from .session.session import Planned, Session
from .stablequant import StableQuantConfig, stablequant_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """``plan`` takes a session, the fingerprint of its weights, histograms."""

    config: type[MethodConfig]
    plan: Callable[[Session, str, Calibration], Planned]


METHODS: dict[str, Method] = {
    "stablequant": Method(StableQuantConfig, stablequant_plan),
    **dict.fromkeys(CALIBRATORS, Method(MethodConfig, calibrator_plan)),
    "percentile": Method(PercentileConfig, calibrator_plan),
    "adaround": Method(AdaRound, adaround_plan),
    "stablequant_plus": Method(PlusConfig, plus_plan),
    "qat": Method(QatConfig, qat_plan),
}

_BLOCKS = [
    (method.config.block, method.config, field(default_factory=method.config))
    for method in METHODS.values()
    if method.config.block
]


class QuantizeConfig(
    make_dataclass(
        "_MethodBlocks",
        [("method", str, choice("stablequant", *METHODS)), *_BLOCKS],
        bases=(CommonConfig,),
        frozen=True,
    )
):
    """The whole ``quantize:`` block: the common keys, and a sub-block for each
    method that has options.

    Arguments
    ---------
    method : str
        ``stablequant``; one calibrator for all layers: ``max``,
        ``percentile``, ``entropy``, ``mse``; ``adaround``;
        ``stablequant_plus``, StableQuant with more parts; ``qat``,
        quantization-aware training.
    adaround, plus, qat : MethodConfig
        Options of the method of that name.
    **common
        Keys of :class:`~speechbrain_stablequant.config.CommonConfig`.
    """

    @property
    def options(self) -> MethodConfig:
        """Options of the method; none for a given plan."""
        if self.plan is not None:
            return MethodConfig()
        kind = METHODS[self.method].config
        return getattr(self, kind.block) if kind.block else kind()

    @property
    def needs_search(self) -> bool:
        """Whether the method measures on the search set."""
        return "search" in self.options.sets

    @property
    def needs_training(self) -> bool:
        """Whether the method trains on the recipe's training set."""
        return "train" in self.options.sets

    @property
    def transcribed(self) -> tuple[str, ...]:
        """Sets whose transcripts decide something: ``search``, ``train``."""
        sets = dict(self.options.sets)
        if self.search.rule == "divergence" and "search" in sets:
            # The WER confirms.
            sets["search"] = True
        return tuple(name for name, decides in sets.items() if decides)

    def settings(self) -> dict[str, Any]:
        settings = asdict(self)
        for key in ("output_folder", "plan", "variants", "inference", "report"):
            del settings[key]
        # These do not change the outcome.
        del settings["search"]["cache_gb"], settings["search"]["max_float_wer"]
        if self.search.rule is None:
            del settings["search"]["rule"]
        read = (self.options.block, *self.options.also_reads)
        for block, *_ in _BLOCKS:
            if block not in read:
                del settings[block]
        return settings


def read_by(name: str | None) -> Callable[[str], bool]:
    """Whether a method reads a key, by its path; every key is read without
    one of ours."""
    if name not in METHODS:
        return lambda path: True
    some = {x for row in METHODS.values() for x in _read(row.config)}
    own = set(_read(METHODS[name].config))
    return lambda path: not is_below(path, some) or is_below(path, own)


def _read(config: type[MethodConfig]) -> tuple[str, ...]:
    return (*([config.block] if config.block else []), *config.also_reads)


def is_below(path: str, names: Iterable[str]) -> bool:
    """Whether the dotted path of a key is in one of some blocks."""
    return any(path == x or path.startswith(f"{x}.") for x in names)


def make_plan(session: Session) -> Planned:
    """Makes the plan of a block, or reads one; a given plan has no histograms.

    Raises a ValueError for a plan of another model, a layer that is never
    called, or NaN.
    """
    for layer in session.layers:
        if not bool(layer.module.weight.isfinite().all()):
            raise ValueError(
                f"{layer.name}: its weight holds NaN or Inf; load another "
                "checkpoint"
            )
    weights = session.fingerprint()
    if session.config.plan is not None:
        plan, histograms = _given_plan(session, weights), {}
    else:
        method = METHODS[session.config.method]
        calibration = calibrate(session, weights)
        plan, histograms = method.plan(session, weights, calibration)
    # All runs keep their tensors to the end: not on the device.
    tensors = plan.tensors and plan.tensors.cpu()
    return replace(plan, tensors=tensors), histograms


def _given_plan(session: Session, weights: str) -> QuantizationPlan:
    """Reads ``plan:`` of the block, and warns of other weights."""
    path = session.config.plan
    plan = QuantizationPlan.load(path)
    plan.check_fits(session.layers, session.recognizer.modules, path)
    if plan.fingerprint != weights:
        logger.warning(
            "quantize.plan: %s was made for other weights of the same "
            "architecture; its scales may not fit",
            path,
        )
    return plan
