"""The ``quantize:`` block of a recipe, validated.

HyperPyYAML does not check nested keys, so every key is checked here, before
anything runs. An error names the key and says what to write instead.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .utils.fields import (
    build,
    choice,
    count,
    fraction,
    not_negative,
    option,
    positive,
)
from .utils.typed import one_line, short

logger = logging.getLogger(__name__)

CALIBRATORS = ("max", "percentile", "entropy", "mse")
#: Methods of other projects: compared with, they write no plan.
RIVALS = ("nncf", "nncf_accuracy_control")
METHODS = (
    "stablequant",
    *CALIBRATORS,
    "adaround",
    "stablequant_plus",
    "qat",
    *RIVALS,
)
#: Decision rules of the search, see ``methods.search.paired``.
RULES = ("threshold", "interval")
#: How the weights file stores what is not quantized.
FLOAT_DTYPES = ("float16", "float32")

# Keys that a variant cannot change.
_SHARED_KEYS = (
    "variants",
    "output_folder",
    "metric_attribute",
    "signal",
    "audio",
    "sample_rate",
    "require_checkpoint",
)
# Old keys that are still accepted, by sub-block.
_RENAMED = {"plus": {"keep_wave": "keep_first_conv_float"}}

_MAX_MESSAGE = 1000
# A variant's name is a folder's name.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class ConfigError(ValueError):
    """A key of the ``quantize:`` block is wrong: one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message, _MAX_MESSAGE))


def _bits(default: int) -> Any:
    return option(default, lambda n: 2 <= n <= 8, "2 to 8")


def _percentiles(default: tuple[float, ...]) -> Any:
    return option(
        default,
        lambda row: len(row) > 0 and all(0 < x <= 100 for x in row),
        "a list of percentiles above 0 and at most 100, such as 99.9",
    )


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

    num_utterances: int | None = count(None)
    batch_size: int = count(1)
    percentile: float = option(
        99.99, lambda x: 0 < x <= 100, "above 0 and at most 100, in percent"
    )
    num_bins: int = option(
        4096,
        lambda n: 128 <= n <= 2**20 and n & (n - 1) == 0,
        "a power of two from 128 to 1048576",
    )


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

    num_utterances: int | None = count(None)
    batch_size: int = count(1)
    metric: str = choice("WER", "WER")
    threshold: float = not_negative(0.25)
    selection: str = choice("threshold", *RULES)
    level: float = option(
        0.8, lambda x: 0 < x < 1, "a coverage between 0 and 1, such as 0.8"
    )
    cutoffs: tuple[float, ...] = _percentiles(
        (100.0, 99.999, 99.99, 99.9, 99.8, 99.5, 99.0)
    )
    cache_gb: float = not_negative(4.0)
    max_float_wer: float = option(90.0, lambda x: x > 0, "positive, in percent")


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

    iterations: int = count(10000)
    lr: float = positive(0.01)
    weight: float = positive(0.01)
    beta_start: float = positive(20.0)
    beta_end: float = positive(2.0)
    warm_start: float = fraction(0.2)
    calibrator: str = choice("mse", *CALIBRATORS)


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

    epochs: int = count(3)
    lr: float = positive(1e-5)
    learn_scales: bool = False
    scale_lr: float = positive(1e-3)
    calibrator: str = choice("mse", *CALIBRATORS)
    keep: str = choice("best", "best", "last")
    distill: float = fraction(0.0)
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

    size: float | None = option(
        None,
        lambda x: 0 < x <= 1,
        "a fraction of the float32 size, such as 0.22",
    )
    bits: tuple[int, ...] = option(
        (4, 5, 6, 8, 16),
        lambda row: len(row) > 0 and all(2 <= b <= 8 or b == 16 for b in row),
        "a list of bits from 2 to 8, or 16 for units that stay float",
    )
    scores: str = choice("divergence", "divergence", "modelopt")


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
    keep_first_conv_float: bool = True
    equalize: bool = True
    strengths: tuple[float, ...] = option(
        (0.5, 0.75),
        lambda row: len(row) > 0 and all(0 <= x <= 1 for x in row),
        "a list of fractions from 0 to 1, such as 0.5",
    )
    cutoffs: str = choice("layers", "layers", "units", "none")
    compensate: bool = True
    damping: float = option(
        0.01, lambda x: 0 < x <= 1, "a fraction above 0 and at most 1"
    )
    earlier_errors: bool = False
    adaround: bool = False
    bias_correction: bool = True
    asymmetric: bool = True
    weight_groups: int = option(
        0, lambda n: n == 0 or n >= 8, "0 (whole rows) or at least 8"
    )
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

    preset: str = choice("mixed", "mixed", "performance")
    max_drop: float = not_negative(0.5)
    ranking_utterances: int | None = count(None)


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

    target: tuple[str, ...] = option(
        ("wav2vec2", "enc", "ctc_lin"), bool, "at least one module's name"
    )
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    weight_bits: int = _bits(8)
    activation_bits: int = _bits(8)
    method: str = choice("stablequant", *METHODS)
    weight_method: str | None = choice(None, "max", "mse")
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    adaround: AdaRoundConfig = field(default_factory=AdaRoundConfig)
    plus: PlusConfig = field(default_factory=PlusConfig)
    nncf: NncfConfig = field(default_factory=NncfConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    plan: str | None = None
    backend: str = "auto"
    backend_options: dict = field(default_factory=dict)
    float_dtype: str = choice("float16", *FLOAT_DTYPES)
    output_folder: str | None = None
    seed: int = 0
    metric_attribute: str = "wer_metric"
    signal: str = "sig"
    audio: str = "wav"
    sample_rate: int = count(16000)
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
            # Options of a runtime are one value, not a sub-block.
            options = changes.pop("backend_options", base["backend_options"])
            merged = _merged(base, changes)
            merged["backend_options"] = options
            configs[name] = _built(merged, where)
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
        config = _built(_with_new_names(block), "quantize")
        config.variant_configs()
        return config


def _merged(base: Mapping, changes: Mapping) -> dict:
    """A copy of ``base`` with some keys changed, sub-blocks key by key."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        result[key] = _merged(base[key], value) if both else value
    return result


def _built(block: Any, path: str) -> QuantizeConfig:
    try:
        config = build(QuantizeConfig, block, path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_together(config, path)
    return config


def _with_new_names(block: Any) -> Any:
    """The block and its variants with renamed keys under their new names."""
    renamed: dict[str, str] = {}
    block = _renamed(block, renamed)
    if isinstance(block, Mapping):
        variants = block.get("variants")
        if isinstance(variants, list | tuple):
            block["variants"] = [_renamed(v, renamed) for v in variants]
    for old, new in renamed.items():
        logger.warning(
            "quantize.%s: was renamed to %s; the old name still works",
            old,
            new,
        )
    return block


def _renamed(block: Any, renamed: dict[str, str]) -> Any:
    """A copy without old keys; notes in ``renamed`` which there were."""
    if not isinstance(block, Mapping):
        return block
    result = dict(block)
    for part, names in _RENAMED.items():
        if not isinstance(result.get(part), Mapping):
            continue
        keys = dict(result[part])
        for old, new in names.items():
            if old in keys and new in keys:
                raise ConfigError(
                    f"quantize.{part}.{old}: is the old name of {new}, which "
                    "is set as well; remove it"
                )
            if old in keys:
                keys[new] = keys.pop(old)
                renamed[f"{part}.{old}"] = new
        result[part] = keys
    return result


def _check_together(config: QuantizeConfig, path: str) -> None:
    """Checks keys that restrict one another."""
    if config.plus.adaround and config.plus.cutoffs != "units":
        raise ConfigError(
            f"{path}.plus.adaround: rounds the units that are selected; set "
            "plus.cutoffs to units"
        )
    if not config.is_rival:
        return
    for key in ("weight_bits", "activation_bits"):
        bits = getattr(config, key)
        if bits != 8:
            raise ConfigError(
                f"{path}.{key}: NNCF quantizes to 8 bits, not to {bits}"
            )
    for name in ("calibration", "search"):
        size = getattr(config, name).batch_size
        if size != 1:
            raise ConfigError(
                f"{path}.{name}.batch_size: method {config.method} takes one "
                f"utterance at a time, not {size}"
            )
    for key, default in (("include", ("*",)), ("exclude", ())):
        if getattr(config, key) != default:
            raise ConfigError(
                f"{path}.{key}: method {config.method} chooses its "
                "operations; leave it out"
            )
