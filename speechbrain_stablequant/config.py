"""The ``quantize:`` block of a recipe: its keys, defaults and checks.

HyperPyYAML does not check nested keys, so all are checked here.
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
METHODS = (
    "stablequant",
    *CALIBRATORS,
    "adaround",
    "stablequant_plus",
    "qat",
)
#: Decision rules of the search, see ``methods.search.paired``.
RULES = ("threshold", "interval")
#: Formats of parameters that are not quantized.
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
# Old keys of sub-blocks: the new name; None if the key was removed.
_OLD_KEYS = {
    ("plus", "keep_wave"): "keep_first_conv_float",
    ("plus", "weight_groups"): None,
}

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
    """``quantize.calibration``: the calibration set and its histograms.

    Arguments
    ---------
    num_utterances : int or None
        Utterances drawn from the validation set, an error if it has fewer;
        None takes at most 128.
    batch_size : int
        Utterances in a batch.
    percentile : float
        Clipping percentile of ``method: percentile``.
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
    """``quantize.search``: the search set and the rules of the search.

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
        ``threshold`` compares the WERs, as published. ``interval`` compares
        paired confidence intervals, and the loss where these are
        inconclusive: for sets too small for ``threshold``.
    level : float
        Coverage of the confidence intervals.
    cutoffs : tuple of float
        Clipping percentiles to try.
    cache_gb : float
        Memory for activations of earlier units, 0 for none; saves time and
        does not change the outcome.
    max_float_wer : float
        Raises an error if the float model's WER is higher, in percent. At
        100 or more, transcripts that the labels cannot spell are accepted.
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
    """``quantize.adaround``: adaptive rounding, with AIMET's settings.

    The loss is a quadratic form in the Hessian of the whole calibration set,
    so there is no batch size.

    Arguments
    ---------
    iterations : int
        Steps for each layer.
    lr : float
        Learning rate.
    weight : float
        Weight of the regularizer that drives each rounding to 0 or 1.
    beta_start, beta_end : float
        First and last exponent of the regularizer.
    warm_start : float
        Fraction of the steps without the regularizer.
    calibrator : str
        Calibrator of the activations: ``max``, ``percentile``, ``entropy`` or
        ``mse``.
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
    """``quantize.qat``: quantization-aware training.

    The defaults train a tenth as long as the float model, with a hundredth of
    its learning rate.

    Arguments
    ---------
    epochs : int
        Epochs over the recipe's training set, with its loader options.
    lr : float
        Learning rate, decayed to 0 by a half cosine.
    learn_scales : bool
        Whether scales are trained (LSQ) or stay as calibrated.
    scale_lr : float
        Learning rate of scales, relative to the scale.
    calibrator : str
        Calibrator of the initial scales: ``max``, ``percentile``, ``entropy``
        or ``mse``.
    keep : str
        ``best``: the epoch with the lowest WER on the search set, the
        calibrated model included; or ``last``, which needs no search set.
    distill : float
        0: the recipe's loss; 1: the divergence from the float model, which
        needs no transcripts; in between: a mixture.
    freeze_feature_extractor : bool
        Whether the encoder's convolutions stay as calibrated, which saves
        time and memory.
    bfloat16 : bool
        Whether training multiplies in bfloat16, which is faster on devices
        that support it. Evaluation and the written model do not use it.
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
    """``quantize.plus.budget``: mixed precision, bits for each unit.

    Arguments
    ---------
    size : float or None
        Size of the model on disk as a fraction of its float32 size; None
        gives every unit ``weight_bits``.
    bits : tuple of int
        Bits to choose from; 16 leaves a unit float.
    scores : str
        Sensitivity of a unit: ``divergence``, that of quantizing it alone at
        each width.
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
    scores: str = "divergence"


@dataclass(frozen=True)
class PlusConfig:
    """``quantize.plus``: the parts of ``method: stablequant_plus``.

    Arguments
    ---------
    rotate : bool
        Rotates the residual stream of pre-norm encoders (QuaRot), which
        removes outlier channels. Costs two matrix products per frame.
    keep_first_conv_float : bool
        Keeps the first convolution float. Its input is the audio itself,
        which 8 bits distort most, and it has hardly any weights.
    equalize : bool
        Migrates scale from activation channels to weights (SmoothQuant).
    strengths : tuple of float
        Migration strengths to try, from 0 to 1; the one with the least
        divergence from the float model is taken.
    cutoffs : str
        Clipping percentiles: ``layers``, one for each layer by the divergence
        it causes; ``units``, one for each unit by WER, as StableQuant does;
        or ``none``.
    compensate : bool
        Rounds weights with error compensation (GPTQ).
    damping : float
        Dampening of the Hessian, as a fraction of its mean diagonal.
    earlier_errors : bool
        Whether GPTQ compensates errors of earlier layers as well. Needs many
        more calibration frames than a layer has inputs: harmful with a few
        seconds of audio.
    adaround : bool
        Rounds the layers of selected units by AdaRound instead, with the
        settings of ``quantize.adaround``.
    bias_correction : bool
        Subtracts the mean error of each output channel from its bias.
    asymmetric : bool
        Uses a zero point for inputs behind a GELU, which are hardly negative.
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
    budget: BudgetConfig = field(default_factory=BudgetConfig)


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
        ``stablequant``; one calibrator for all layers: ``max``,
        ``percentile``, ``entropy``, ``mse``; ``adaround``;
        ``stablequant_plus``, StableQuant with more parts; ``qat``,
        quantization-aware training.
    weight_method : str or None
        Calibrator of weights, ``max`` or ``mse``; None for the method's own.
    calibration : CalibrationConfig
        The calibration set.
    search : SearchConfig
        The search set and the rules of the search.
    adaround, plus, qat : dataclass
        Options of the method of that name.
    plan : str or None
        A ``plan.json`` to use instead of calibrating and searching.
    backend : str
        Runtime that evaluates the test sets: ``auto`` (triton on CUDA; on a
        CPU openvino, else torch_int8), ``torch`` (simulated), ``torch_int8``,
        ``openvino``, ``onnx`` or ``triton``.
    backend_options : dict
        Options of the runtime, see
        :mod:`speechbrain_stablequant.runtimes`; with ``auto`` those
        of any runtime that it may choose.
    float_dtype : str
        ``float16`` or ``float32``: how parameters that are not quantized are
        stored, and evaluated.
    output_folder : str or None
        Where to write; None for ``quantized`` in the recipe's output folder.
    seed : int
        Seed of the drawn utterances.
    metric_attribute : str
        Attribute of the Brain that holds the word error statistics.
    signal : str
        Attribute of a batch that holds the audio and its lengths.
    audio : str
        Column of the data set with the path of the audio file.
    sample_rate : int
        Sample rate of the model in Hz.
    require_checkpoint : bool
        Whether a Brain with a checkpointer must find a checkpoint.
    variants : tuple of dict
        Changes to this block, each with a ``name``: each is evaluated in a
        folder of its own, and one table compares them.
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
        )

    @property
    def needs_training(self) -> bool:
        """Whether the method trains on the recipe's training set."""
        return self.plan is None and self.method == "qat"

    @property
    def transcribed(self) -> tuple[str, ...]:
        """Sets whose transcripts decide something: ``search``, ``train``."""
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
    """The block and its variants without old keys; warns of each once."""
    said: dict[str, None] = {}
    block = _renamed(block, said)
    if isinstance(block, Mapping):
        variants = block.get("variants")
        if isinstance(variants, list | tuple):
            block["variants"] = [_renamed(v, said) for v in variants]
    for message in said:
        logger.warning("%s", message)
    return block


def _renamed(block: Any, said: dict[str, None]) -> Any:
    """A copy without old keys; adds what to warn of to ``said``."""
    if not isinstance(block, Mapping):
        return block
    result = {
        key: dict(value) if isinstance(value, Mapping) else value
        for key, value in block.items()
    }
    for (part, old), new in _OLD_KEYS.items():
        keys = result.get(part)
        if not isinstance(keys, dict) or old not in keys:
            continue
        where, value = f"quantize.{part}.{old}", keys.pop(old)
        if new in keys:
            raise ConfigError(
                f"{where}: is the old name of {new}, which is set as well; "
                "remove it"
            )
        if new is not None:
            keys[new] = value
            said[f"{where}: was renamed to {new}; the old name still works"] = (
                None
            )
        elif value:
            raise ConfigError(f"{where}: was removed; leave it out")
        else:
            said[f"{where}: was removed; leave it out"] = None
    return result


def _check_together(config: QuantizeConfig, path: str) -> None:
    """Checks keys that restrict one another."""
    if config.plus.adaround and config.plus.cutoffs != "units":
        raise ConfigError(
            f"{path}.plus.adaround: rounds the units that are selected; set "
            "plus.cutoffs to units"
        )
