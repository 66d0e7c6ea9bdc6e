"""The ``quantize:`` block of a recipe, validated.

HyperPyYAML does not check nested keys, so every key is checked here, before
anything runs. An error names the key and says what to write instead.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .checkpoint import FLOAT_DTYPES
from .runtime import RUNTIMES

# Simple calibrators, and the search that this package is about.
METHODS = ("stablequant", "max", "percentile", "entropy", "mse")
BACKENDS = ("auto", *RUNTIMES)
WEIGHT_METHODS = ("max", "mse")


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

# A variant's name is a folder's name.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class ConfigError(ValueError):
    """A key of the ``quantize:`` block is wrong."""


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
    cutoffs : tuple of float
        Cut-off ratios to try, in percent.
    cache_gb : float
        Memory for results of earlier units that the search may reuse, 0 for
        none; the outcome is the same.
    """

    num_utterances: int | None = None
    batch_size: int = 1
    metric: str = "WER"
    threshold: float = 0.25
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
        ``percentile``, ``entropy``, ``mse``.
    weight_method : str or None
        ``max`` or ``mse``; None takes what the method defines.
    calibration : CalibrationConfig
        Where the histograms come from.
    search : SearchConfig
        The search set and the rules of the search.
    plan : str or None
        A ``plan.json`` to use instead of calibrating and searching.
    backend : str
        What executes the plan when the test sets are evaluated: ``auto``
        (triton on CUDA; openvino, else torch_int8 on a CPU), ``torch``
        (simulated), ``torch_int8``, ``openvino``, ``onnx`` or ``triton``.
    backend_options : dict
        Of the runtime, such as its number of threads.
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
        """Whether units are selected and cut-offs searched."""
        return self.method == "stablequant" and self.plan is None

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
                    f"not {name!r}"
                )
            if name in configs:
                raise ConfigError(f"{where}.name: '{name}' is used twice")
            for key in _SHARED_KEYS:
                if key in changes:
                    raise ConfigError(f"{where}.{key}: belongs to the block")
            for part in ("calibration", "search"):
                if isinstance(changes.get(part), Mapping):
                    changes[part] = {**base[part], **changes[part]}
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


def _build(cls: type, block: Any, path: str) -> Any:
    if not isinstance(block, Mapping):
        raise ConfigError(f"{path}: must be a block of keys, not {block!r}")
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for key, value in block.items():
        where = f"{path}.{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = (
                f"did you mean '{close[0]}'?"
                if close
                else f"known keys: {', '.join(known)}"
            )
            raise ConfigError(f"{where}: unknown key; {hint}")
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
                f"{where}: must be a list of {item.__name__}, not {value!r}"
            )
        return tuple(_convert(v, item, where) for v in value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint is dict and isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, hint) or (hint is int and not is_number):
        raise ConfigError(f"{where}: must be {hint.__name__}, not {value!r}")
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
