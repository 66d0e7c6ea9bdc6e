"""The ``quantize:`` block of a recipe, validated.

HyperPyYAML does not check nested keys, so every key is checked here, before
anything runs. An error names the key and says what to write instead.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .folder.weights_file import FLOAT_DTYPES
from .runtimes import RUNTIMES
from .runtimes.options import check_options, select_options
from .utils.typed import inside, one_line, short, typed, unknown_key

# Simple calibrators, and the search that this package is about.
METHODS = (
    "stablequant",
    "max",
    "percentile",
    "entropy",
    "mse",
    "adaround",
    "stablequant_plus",
    "qat",
    "nncf",
    "nncf_accuracy_control",
)
# Made by others: they have no plan, and are only compared.
RIVALS = ("nncf", "nncf_accuracy_control")
NNCF_PRESETS = ("mixed", "performance")
BACKENDS = ("auto", *RUNTIMES)
#: How the search decides, see ``methods.search.paired``.
RULES = ("threshold", "interval")
WEIGHT_METHODS = ("max", "mse")


# What gets a cut-off of its own in StableQuant-plus.
CUTOFFS = ("layers", "units", "none")
# What measures units for mixed precision.
SCORES = ("divergence", "modelopt")
# Blocks inside of the block.
_PARTS = ("calibration", "search", "adaround", "plus", "qat", "nncf")
# What all variants of a block have in common.
_SHARED_KEYS = (
    "variants",
    "output_folder",
    "metric_attribute",
    "signal",
    "audio",
    "sample_rate",
    "require_checkpoint",
)

_MAX_MESSAGE = 1000

# A variant's name is a folder's name.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class ConfigError(ValueError):
    """A key of the ``quantize:`` block is wrong: one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message, _MAX_MESSAGE))


@dataclass(frozen=True)
class CalibrationConfig:
    """``quantize.calibration``: where the histograms come from.

    Arguments
    ---------
    num_utterances : int or None
        Utterances drawn from the validation set; None takes at most 128. A
        number that the set cannot give is an error.
    batch_size : int
        Utterances in a batch.
    percentile : float
        For ``method: percentile``, in percent.
    num_bins : int
        Bins of each histogram, a power of two.
    """

    num_utterances: int | None = None
    batch_size: int = 1
    percentile: float = 99.99
    num_bins: int = 4096


@dataclass(frozen=True)
class SearchConfig:
    """``quantize.search``: the set and the rules of the search.

    Arguments
    ---------
    num_utterances : int or None
        Utterances drawn from the validation set; None takes at most 256.
    batch_size : int
        Utterances in a batch. Padding changes the WER of these models, so
        the default is 1.
    metric : str
        ``WER``.
    threshold : float
        A unit is selected when quantizing it alone raises the WER by more
        than this, in points.
    selection : str
        ``threshold``: by the figures as they are, as published. ``interval``:
        by paired intervals, and by the loss where the WER leaves it open,
        for sets that are too small for the threshold.
    level : float
        Coverage of these intervals.
    cutoffs : tuple of float
        Cut-off ratios to try, in percent.
    cache_gb : float
        Memory for results of earlier units that the search may reuse, 0 for
        none; the outcome is the same.
    max_float_wer : float
        A float model with a higher WER, in percent, is an error: there is
        nothing to search for. 100 or more also takes transcripts that the
        recipe's labels cannot write.
    """

    num_utterances: int | None = None
    batch_size: int = 1
    metric: str = "WER"
    threshold: float = 0.25
    selection: str = "threshold"
    level: float = 0.8
    cutoffs: tuple[float, ...] = (
        100.0,
        99.999,
        99.99,
        99.9,
        99.8,
        99.5,
        99.0,
    )
    cache_gb: float = 4.0
    max_float_wer: float = 90.0


@dataclass(frozen=True)
class AdaRoundConfig:
    """``quantize.adaround``: adaptive rounding, with its authors' settings.

    It sees all frames of the calibration set at once (its loss is a
    quadratic form in their second moments), so there is no batch size.

    Arguments
    ---------
    iterations : int
        Steps for each layer.
    lr : float
        Learning rate.
    weight : float
        Of the term that makes the rounding hard.
    beta_start, beta_end : float
        Its exponent, at first and at last.
    warm_start : float
        Fraction of the steps without it.
    calibrator : str
        Of the activations: ``max``, ``percentile``, ``entropy`` or ``mse``.
    """

    iterations: int = 10000
    lr: float = 0.01
    weight: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warm_start: float = 0.2
    calibrator: str = "mse"


@dataclass(frozen=True)
class QatConfig:
    """``quantize.qat``: training of the quantized model, a tenth as long as
    the float model's and with a hundredth of its learning rate.

    Arguments
    ---------
    epochs : int
        Over the recipe's training set, with the recipe's loader options.
    lr : float
        Learning rate, falling to 0 along half a cosine.
    learn_scales : bool
        Whether the scales are trained as well (LSQ), or stay as calibrated.
    scale_lr : float
        Learning rate of scales, as a fraction of the scale.
    calibrator : str
        Of the model that the training begins with: ``max``, ``percentile``,
        ``entropy`` or ``mse``.
    keep : str
        ``best``: the epoch with the lowest WER on the search set, the
        calibrated model being one of them; or ``last``, without a search set.
    distill : float
        0: the recipe's loss; 1: the divergence from the float model, which
        needs no transcripts; or a mixture.
    freeze_feature_extractor : bool
        Whether the encoder's convolutions stay as calibrated, which saves
        time and memory.
    bfloat16 : bool
        Whether products are computed in bfloat16 while training: faster
        where the device has such instructions. What is measured and stored
        is exact in any case.
    """

    epochs: int = 3
    lr: float = 1e-5
    learn_scales: bool = False
    scale_lr: float = 1e-3
    calibrator: str = "mse"
    keep: str = "best"
    distill: float = 0.0
    freeze_feature_extractor: bool = False
    bfloat16: bool = False


@dataclass(frozen=True)
class BudgetConfig:
    """``quantize.plus.budget``: bits for each unit by its sensitivity.

    Arguments
    ---------
    size : float or None
        Size of the model on disk as a fraction of its float32 size; None
        gives every unit ``weight_bits``.
    bits : tuple of int
        To choose from; 16 leaves a unit float.
    scores : str
        How a unit's sensitivity is measured: ``divergence``, each unit alone
        at each width; or ``modelopt``, by the gradients of NVIDIA's
        AutoQuantize, to compare with.
    """

    size: float | None = None
    bits: tuple[int, ...] = (4, 5, 6, 8, 16)
    scores: str = "divergence"


@dataclass(frozen=True)
class PlusConfig:
    """``quantize.plus``: the parts of ``method: stablequant_plus``.

    Arguments
    ---------
    rotate : bool
        Rotates the residual stream of encoders that normalize before each
        sublayer (QuaRot): linears behind a normalization take in mixtures of
        all channels, without outliers. Costs two products per frame.
    keep_wave : bool
        The first convolution, which takes in the audio itself, stays float:
        8 bits of audio are among the largest errors of all, and it has hardly
        any of the weights.
    equalize : bool
        Moves factors from the channels of activations to those of weights,
        where that leaves the float model as it is.
    strengths : tuple of float
        How far, from 0 (not at all) to 1; the one with the least divergence
        from the float model is taken.
    cutoffs : str
        ``layers``: a cut-off for each layer by the divergence that it alone
        causes; ``units``: as StableQuant does, by word errors; ``none``.
    compensate : bool
        Rounds with compensation of the error (GPTQ).
    damping : float
        Of the compensation, as a fraction of the inputs' mean energy.
    earlier_errors : bool
        Whether it also compensates the errors of earlier layers. Needs many
        more calibration frames than a layer has inputs: with a few seconds
        of audio it harms.
    adaround : bool
        Rounds the layers of selected units by AdaRound instead, with the
        settings of ``quantize.adaround``.
    bias_correction : bool
        Takes the mean error of each output channel out of its bias.
    asymmetric : bool
        All integers for inputs behind a GELU, which are hardly negative.
    weight_groups : int
        Below 6 bits, so many neighboring weights of a row share a scale; 0
        for whole rows.
    budget : BudgetConfig
        Mixed precision.
    """

    rotate: bool = True
    keep_wave: bool = True
    equalize: bool = True
    strengths: tuple[float, ...] = (0.5, 0.75)
    cutoffs: str = "layers"
    compensate: bool = True
    damping: float = 0.01
    earlier_errors: bool = False
    adaround: bool = False
    bias_correction: bool = True
    asymmetric: bool = True
    weight_groups: int = 0
    budget: BudgetConfig = field(default_factory=BudgetConfig)


@dataclass(frozen=True)
class NncfConfig:
    """``quantize.nncf``: OpenVINO models quantized by NNCF, as rivals.

    Arguments
    ---------
    preset : str
        NNCF's: ``mixed`` has asymmetric activations and is its choice for
        transformers, ``performance`` symmetric ones.
    max_drop : float
        For ``nncf_accuracy_control``: operations are made float again until
        the WER of the search set rises by at most this, in points.
    ranking_utterances : int or None
        Utterances of the search set on which it ranks operations, those that
        suffer most; None for all.
    """

    preset: str = "mixed"
    max_drop: float = 0.5
    ranking_utterances: int | None = None


@dataclass(frozen=True)
class QuantizeConfig:
    """The whole ``quantize:`` block.

    Arguments
    ---------
    target : tuple of str
        Keys of the recipe's ``modules`` to quantize.
    include, exclude : tuple of str
        fnmatch patterns over layer names.
    weight_bits, activation_bits : int
        2 to 8.
    method : str
        ``stablequant``, or one calibrator for all layers: ``max``,
        ``percentile``, ``entropy``, ``mse``; or ``adaround``; or
        ``stablequant_plus``, which adds parts to StableQuant; or ``qat``,
        which trains the quantized model; or a rival from outside, to compare
        with: ``nncf``, ``nncf_accuracy_control``.
    weight_method : str or None
        ``max`` or ``mse``; None takes what the method defines.
    calibration : CalibrationConfig
        Where the histograms come from.
    search : SearchConfig
        The search set and the rules of the search.
    adaround : AdaRoundConfig
        For ``method: adaround``.
    plus : PlusConfig
        For ``method: stablequant_plus``.
    nncf : NncfConfig
        For ``method: nncf`` and ``nncf_accuracy_control``.
    qat : QatConfig
        For ``method: qat``.
    plan : str or None
        A ``plan.json`` to use instead of calibrating and searching.
    backend : str
        What executes the plan when the test sets are evaluated: ``auto``
        (triton on CUDA; openvino, else torch_int8 on a CPU), ``torch``
        (simulated), ``torch_int8``, ``openvino``, ``onnx`` or ``triton``.
    backend_options : dict
        Of the runtime, such as its number of threads, see
        :mod:`speechbrain_stablequant.runtimes.options`. With ``auto`` those of
        all runtimes that it may choose: each takes those that it knows.
    float_dtype : str
        ``float16`` or ``float32``: how the file stores all that is not
        quantized; it is evaluated as it is stored.
    output_folder : str or None
        Where to write; None is ``quantized`` below the recipe's own.
    seed : int
        Draws the utterances.
    metric_attribute : str
        Attribute of the Brain that holds the word error statistics.
    signal : str
        Attribute of a batch that holds the audio and its lengths.
    audio : str
        Column of the data set with the path of the audio file.
    sample_rate : int
        Of the model, in Hz.
    require_checkpoint : bool
        Whether a Brain with a checkpointer must find a checkpoint.
    variants : tuple of dict
        Changes to this block, each with a ``name``: each is made and
        evaluated in its own folder, and one table compares them.
    """

    target: tuple[str, ...] = ("wav2vec2", "enc", "ctc_lin")
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    weight_bits: int = 8
    activation_bits: int = 8
    method: str = "stablequant"
    weight_method: str | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    adaround: AdaRoundConfig = field(default_factory=AdaRoundConfig)
    plus: PlusConfig = field(default_factory=PlusConfig)
    nncf: NncfConfig = field(default_factory=NncfConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    plan: str | None = None
    backend: str = "auto"
    backend_options: dict = field(default_factory=dict)
    float_dtype: str = "float16"
    output_folder: str | None = None
    seed: int = 0
    metric_attribute: str = "wer_metric"
    signal: str = "sig"
    audio: str = "wav"
    sample_rate: int = 16000
    require_checkpoint: bool = True
    variants: tuple[dict, ...] = ()

    @property
    def needs_search(self) -> bool:
        """Whether the method measures on the search set."""
        if self.needs_training:
            return self.qat.keep == "best"
        return self.plan is None and self.method in (
            "stablequant",
            "stablequant_plus",
            "nncf_accuracy_control",
        )

    @property
    def is_rival(self) -> bool:
        """Whether others quantize: there is no plan then."""
        return self.plan is None and self.method in RIVALS

    @property
    def needs_training(self) -> bool:
        """Whether the method trains on the recipe's training set."""
        return self.plan is None and self.method == "qat"

    @property
    def transcribed(self) -> tuple[str, ...]:
        """The sets whose transcripts take part in a decision: ``search``,
        ``train``."""
        found = []
        if self.needs_training:
            decide = self.needs_search
            if self.qat.distill < 1:
                found.append("train")
        elif self.method == "stablequant_plus":
            decide = self.plan is None and self.plus.cutoffs == "units"
        else:
            decide = self.needs_search
        return (*found, "search") if decide else tuple(found)

    @property
    def needs_modelopt(self) -> bool:
        """Whether units are measured by modelopt."""
        budget = self.plus.budget
        return (
            self.plan is None
            and self.method == "stablequant_plus"
            and budget.size is not None
            and budget.scores == "modelopt"
        )

    @property
    def extras(self) -> frozenset[str]:
        """What the plan will need of a runtime beyond plain integers."""
        if self.plan is not None or self.method != "stablequant_plus":
            return frozenset()
        switches = {
            "asymmetric": self.plus.asymmetric,
            "weight_groups": self.plus.weight_groups > 0,
        }
        return frozenset(name for name, on in switches.items() if on)

    def variant_configs(self) -> dict[str, "QuantizeConfig"]:
        """This block with the changes of each variant, by name.

        Returns
        -------
        dict
            Without variants, this block under the empty name.

        Raises
        ------
        ConfigError
            A variant that is not a valid block, or a name used twice.

        Example
        -------
        >>> block = {"variants": [{"name": "w6", "weight_bits": 6}]}
        >>> configs = QuantizeConfig.from_dict(block).variant_configs()
        >>> {name: config.weight_bits for name, config in configs.items()}
        {'w6': 6}
        """
        if not self.variants:
            return {"": self}
        base = asdict(self)
        del base["variants"]
        configs = {}
        for index, variant in enumerate(self.variants):
            where = f"quantize.variants[{index}]"
            changes = dict(variant)
            name = changes.pop("name", None)
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{where}.name: must be letters, digits, '-', '_' or '.', "
                    f"not {short(name)}"
                )
            if name in configs:
                raise ConfigError(f"{where}.name: '{name}' is used twice")
            for key in _SHARED_KEYS:
                if key in changes:
                    raise ConfigError(f"{where}.{key}: belongs to the block")
            for part in _PARTS:
                if isinstance(changes.get(part), Mapping):
                    changes[part] = _merged(base[part], changes[part])
            if changes.get("backend") in RUNTIMES:
                # The block's options may be those of another runtime.
                changes.setdefault(
                    "backend_options",
                    select_options(changes["backend"], self.backend_options),
                )
            config = _build(QuantizeConfig, {**base, **changes}, where)
            _check_values(config, where)
            configs[name] = config
        return configs

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "QuantizeConfig":
        """Validates a block.

        Arguments
        ---------
        block : Mapping
            As read from YAML.

        Returns
        -------
        QuantizeConfig

        Raises
        ------
        ConfigError
            Names the first wrong key.

        Example
        -------
        >>> QuantizeConfig.from_dict({"weight_bits": 6}).weight_bits
        6
        >>> QuantizeConfig.from_dict({"weight_bitz": 6})
        Traceback (most recent call last):
            ...
        speechbrain_stablequant.config.ConfigError: quantize.weight_bitz: \
unknown key; did you mean 'weight_bits'?
        """
        config = _build(cls, block, "quantize")
        _check_values(config, "quantize")
        config.variant_configs()
        return config


def _merged(base: Mapping, changes: Mapping) -> dict:
    """A part of the block with some of its keys changed.

    Example
    -------
    >>> _merged({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}})
    {'a': 1, 'b': {'c': 4, 'd': 3}}
    """
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        result[key] = _merged(base[key], value) if both else value
    return result


def _build(cls: type, block: Any, path: str) -> Any:
    if not isinstance(block, Mapping):
        raise ConfigError(
            f"{path}: must be a block of keys, not {short(block)}"
        )
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for key, value in block.items():
        where = inside(path, key)
        if key not in known:
            raise ConfigError(f"{where}: {unknown_key(key, known)}")
        hint = hints[key]
        if is_dataclass(hint):
            values[key] = _build(hint, value, where)
        else:
            values[key] = _convert(value, hint, where)
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Checks a value against a type, lists becoming tuples."""
    if get_origin(hint) is UnionType:
        if value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if isinstance(value, str) and item is str:
            return (value,)
        if not isinstance(value, list | tuple):
            raise ConfigError(
                f"{where}: must be a list of {item.__name__}, not "
                f"{short(value)}"
            )
        return tuple(_convert(v, item, where) for v in value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and isinstance(value, float):
        return value
    if is_number and hint in (int, float):
        try:
            # Not of a size that no number of ours has.
            return typed(value, hint, where)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint is dict and isinstance(value, Mapping):
        return {
            k: str(v) if isinstance(v, Path) else v for k, v in value.items()
        }
    if not isinstance(value, hint) or (hint is int and not is_number):
        raise ConfigError(
            f"{where}: must be {hint.__name__}, not {short(value)}"
        )
    return value


def _check_values(config: QuantizeConfig, path: str) -> None:
    """Raises an error that names the first wrong value below ``path``."""

    def require(good: bool, where: str, what: str) -> None:
        if not good:
            raise ConfigError(f"{path}.{where}: {what}")

    for key, known in (
        ("method", METHODS),
        ("backend", BACKENDS),
        ("float_dtype", tuple(FLOAT_DTYPES)),
        ("weight_method", (None, *WEIGHT_METHODS)),
    ):
        value = getattr(config, key)
        names = ", ".join(str(k) for k in known if k is not None)
        require(value in known, key, f"'{value}' is not one of {names}")
    try:
        check_options(config.backend, config.backend_options)
    except ValueError as error:
        raise ConfigError(f"{path}.{error}") from error
    for key in ("weight_bits", "activation_bits"):
        bits = getattr(config, key)
        require(2 <= bits <= 8, key, f"must be 2 to 8, not {bits}")
    require(len(config.target) > 0, "target", "names no module")
    require(config.sample_rate > 0, "sample_rate", "must be positive")
    for name in ("calibration", "search"):
        part = getattr(config, name)
        count = part.num_utterances
        require(
            count is None or count > 0,
            f"{name}.num_utterances",
            f"must be at least 1, not {count}",
        )
        require(
            part.batch_size > 0,
            f"{name}.batch_size",
            f"must be at least 1, not {part.batch_size}",
        )
    _check_adaround(config.adaround, require)
    _check_plus(config.plus, require)
    _check_nncf(config, require)
    _check_qat(config.qat, require)
    bins = config.calibration.num_bins
    require(
        128 <= bins <= 2**20 and bins & (bins - 1) == 0,
        "calibration.num_bins",
        f"must be a power of two from 128 to 1048576, not {bins}",
    )
    percentile = config.calibration.percentile
    require(
        0 < percentile <= 100,
        "calibration.percentile",
        f"must be in percent, above 0 and at most 100, not {percentile}",
    )
    search = config.search
    require(
        search.metric == "WER",
        "search.metric",
        f"'{search.metric}' is not one of WER",
    )
    require(
        0 <= search.threshold < math.inf,
        "search.threshold",
        f"must be finite and not negative, not {search.threshold}",
    )
    require(
        search.selection in RULES,
        "search.selection",
        f"'{search.selection}' is not one of {', '.join(RULES)}",
    )
    require(
        0 < search.level < 1,
        "search.level",
        f"must be a coverage between 0 and 1, such as 0.8, not {search.level}",
    )
    require(
        search.max_float_wer > 0,
        "search.max_float_wer",
        f"must be positive, in percent, not {search.max_float_wer}",
    )
    require(
        0 <= search.cache_gb < math.inf,
        "search.cache_gb",
        f"must be finite and not negative, not {search.cache_gb}",
    )
    require(
        len(search.cutoffs) > 0
        and all(0 < ratio <= 100 for ratio in search.cutoffs),
        "search.cutoffs",
        "must be ratios in percent, above 0 and at most 100, such as 99.9",
    )


def _check_adaround(part: AdaRoundConfig, require: Callable) -> None:
    require(
        part.iterations > 0,
        "adaround.iterations",
        f"must be at least 1, not {part.iterations}",
    )
    for key in ("lr", "weight", "beta_start", "beta_end"):
        value = getattr(part, key)
        require(
            0 < value < math.inf,
            f"adaround.{key}",
            f"must be positive and finite, not {value}",
        )
    require(
        0 <= part.warm_start <= 1,
        "adaround.warm_start",
        f"must be a fraction from 0 to 1, not {part.warm_start}",
    )
    known = ("max", "percentile", "entropy", "mse")
    require(
        part.calibrator in known,
        "adaround.calibrator",
        f"'{part.calibrator}' is not one of {', '.join(known)}",
    )


def _check_nncf(config: QuantizeConfig, require: Callable) -> None:
    part = config.nncf
    require(
        part.preset in NNCF_PRESETS,
        "nncf.preset",
        f"'{part.preset}' is not one of {', '.join(NNCF_PRESETS)}",
    )
    require(
        0 <= part.max_drop < math.inf,
        "nncf.max_drop",
        f"must be finite and not negative, not {part.max_drop}",
    )
    count = part.ranking_utterances
    require(
        count is None or count > 0,
        "nncf.ranking_utterances",
        f"must be at least 1, not {count}",
    )
    if not config.is_rival:
        return
    for key in ("weight_bits", "activation_bits"):
        bits = getattr(config, key)
        require(bits == 8, key, f"NNCF quantizes to 8 bits, not to {bits}")
    for name in ("calibration", "search"):
        size = getattr(config, name).batch_size
        require(
            size == 1,
            f"{name}.batch_size",
            f"method {config.method} takes one utterance at a time, not {size}",
        )
    for key, default in (("include", ("*",)), ("exclude", ())):
        require(
            getattr(config, key) == default,
            key,
            f"method {config.method} chooses its operations; leave it out",
        )


def _check_qat(part: QatConfig, require: Callable) -> None:
    require(
        part.epochs > 0,
        "qat.epochs",
        f"must be at least 1, not {part.epochs}",
    )
    for key in ("lr", "scale_lr"):
        value = getattr(part, key)
        require(
            0 < value < math.inf,
            f"qat.{key}",
            f"must be positive and finite, not {value}",
        )
    require(
        0 <= part.distill <= 1,
        "qat.distill",
        f"must be a fraction from 0 to 1, not {part.distill}",
    )
    for key, known in (
        ("calibrator", ("max", "percentile", "entropy", "mse")),
        ("keep", ("best", "last")),
    ):
        value = getattr(part, key)
        require(
            value in known,
            f"qat.{key}",
            f"'{value}' is not one of {', '.join(known)}",
        )


def _check_plus(part: PlusConfig, require: Callable) -> None:
    require(
        part.cutoffs in CUTOFFS,
        "plus.cutoffs",
        f"'{part.cutoffs}' is not one of {', '.join(CUTOFFS)}",
    )
    require(
        not part.adaround or part.cutoffs == "units",
        "plus.adaround",
        "rounds the units that are selected: set plus.cutoffs to units",
    )
    require(
        len(part.strengths) > 0 and all(0 <= s <= 1 for s in part.strengths),
        "plus.strengths",
        "must be fractions from 0 to 1, such as 0.5",
    )
    require(
        0 < part.damping <= 1,
        "plus.damping",
        f"must be a fraction above 0 and at most 1, not {part.damping}",
    )
    groups = part.weight_groups
    require(
        groups == 0 or groups >= 8,
        "plus.weight_groups",
        f"must be 0 (whole rows) or at least 8, not {groups}",
    )
    size, bits = part.budget.size, part.budget.bits
    require(
        size is None or 0 < size <= 1,
        "plus.budget.size",
        f"must be a fraction of the float32 size such as 0.22, not {size}",
    )
    require(
        len(bits) > 0 and all(2 <= b <= 8 or b == 16 for b in bits),
        "plus.budget.bits",
        "must be bits from 2 to 8, or 16 for units that stay float",
    )
    require(
        part.budget.scores in SCORES,
        "plus.budget.scores",
        f"'{part.budget.scores}' is not one of {', '.join(SCORES)}",
    )
