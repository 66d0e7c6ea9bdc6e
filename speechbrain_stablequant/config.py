"""The common keys of the ``quantize:`` block, and how a block is read."""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from .utils.presets import merged, with_preset
from .utils.typed import (
    choice,
    count,
    not_negative,
    one_line,
    option,
    short,
    typed,
)

logger = logging.getLogger(__name__)

#: Formats of parameters that are not quantized.
FLOAT_DTYPES = ("float16", "float32")

#: The metric that decides, where a Brain has one of that name.
DEFAULT_METRIC = "wer_metric"

# Keys that a variant cannot change.
_SHARED_KEYS = (
    "variants",
    "output_folder",
    "metric_attribute",
    "signal",
    "audio",
    "sample_rate",
    "require_checkpoint",
    "inference",
    "report",
)
_MAX_MESSAGE = 1000
# A variant's name is a folder's name.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class ConfigError(ValueError):
    """A key of the ``quantize:`` block is wrong: one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message, _MAX_MESSAGE))


def _bits(default: int) -> Any:
    return option(default, lambda n: 2 <= n <= 8, "2 to 8")


@dataclass(frozen=True)
class CalibrationConfig:
    """``quantize.calibration``: the calibration set and its histograms.

    Arguments
    ---------
    num_utterances : int or None
        Utterances drawn from the validation set, or the manifest where there
        is no recipe; an error if it has fewer. None takes at most 128.
    batch_size : int
        Utterances in a batch.
    percentile : float
        Clipping percentile of ``method: percentile``.
    num_bins : int
        Bins of each histogram.
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
        Utterances drawn from the same set; None takes at most 256.
    batch_size : int
        Utterances in a batch. Padding changes the WER of these models, so
        the default is 1.
    metric : str
        ``WER``: the error rate that ``metric_attribute`` names.
    threshold : float
        A unit is selected when quantizing it alone raises the WER by more
        than this, in points.
    rule : str or None
        How candidates of a clipping percentile are compared: ``wer``, as
        published; ``divergence`` from the float model's outputs for the
        reference's tokens, confirmed by WER at the end of a unit. None is
        ``divergence`` where the recipe decodes token by token, else ``wer``.
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
    rule: str | None = choice(None, "wer", "divergence")
    threshold: float = not_negative(0.25)
    selection: str = choice("threshold", "threshold", "interval")
    level: float = option(
        0.8, lambda x: 0 < x < 1, "a coverage between 0 and 1, such as 0.8"
    )
    cutoffs: tuple[float, ...] = option(
        (100.0, 99.999, 99.99, 99.9, 99.8, 99.5, 99.0),
        lambda row: len(row) > 0 and all(0 < x <= 100 for x in row),
        "a list of percentiles above 0 and at most 100, such as 99.9",
    )
    cache_gb: float = not_negative(4.0)
    max_float_wer: float = option(90.0, lambda x: x > 0, "positive, in percent")


@dataclass(frozen=True)
class ReportConfig:
    """``quantize.report``: what the report shows.

    Arguments
    ---------
    utterances : bool
        The transcripts of the utterances that became worse.
    """

    utterances: bool = True


@dataclass(frozen=True)
class MethodConfig:
    """Options of a method, a block of keys, and what follows from them.

    A method without options has this class itself.
    """

    #: Key of the block; empty if the method has no options.
    block: ClassVar[str] = ""
    #: Other methods' blocks, and keys that not every method reads, which it
    #: reads; those of no method are common to all.
    also_reads: ClassVar[tuple[str, ...]] = ()
    #: Old keys of the block: the new name; None if the key was removed.
    old_keys: ClassVar[Mapping[str, str | None]] = {}

    @property
    def sets(self) -> dict[str, bool]:
        """Sets read beside calibration's, and whether transcripts are used."""
        return {}

    def check(self) -> None:
        """Raises a ValueError, with the key first, for keys at odds."""


@dataclass(frozen=True)
class CommonConfig:
    """The keys of the ``quantize:`` block that all methods share.

    ``preset: NAME`` adds the keys of a file of ``hparams/``.

    Arguments
    ---------
    target : tuple of str
        Keys of the recipe's ``modules`` to quantize.
    include : tuple of str
        fnmatch patterns over names of layers, which are quantized.
    exclude : tuple of str
        fnmatch patterns over names of layers, which stay float.
    weight_bits : int
        Bits of weights.
    activation_bits : int
        Bits of the inputs of layers.
    method : str
        See :class:`~speechbrain_stablequant.QuantizeConfig`.
    weight_method : str or None
        Calibrator of weights, ``max`` or ``mse``; None for the method's own.
    calibration : CalibrationConfig
        The calibration set.
    search : SearchConfig
        The search set and the rules of the search.
    plan : str or None
        A ``plan.json`` to use instead of calibrating and searching.
    backend : str
        Runtime that evaluates the test sets: ``auto`` (triton on CUDA; on a
        CPU openvino, else torch_int8), ``torch`` (simulated), ``torch_int8``,
        ``openvino``, ``onnx`` or ``triton``.
    backend_options : dict
        Options of the runtime; with ``auto`` those of any runtime that it
        may choose.
    float_dtype : str
        ``float16`` or ``float32``: how parameters that are not quantized are
        stored, and evaluated.
    output_folder : str or None
        Where to write; None for ``quantized`` in the recipe's output folder.
    seed : int
        Seed of the drawn utterances.
    metric_attribute : str
        Attribute of the Brain with the ErrorRateStats that decides. A Brain
        without the default's: the first of words, phonemes, characters.
    signal : str
        Attribute of a batch that holds the audio and its lengths.
    audio : str
        Column of the data set with the path of the audio file.
    sample_rate : int
        Sample rate of the model in Hz.
    require_checkpoint : bool
        Whether a Brain with a checkpointer must find a checkpoint.
    inference : str or None
        A YAML for SpeechBrain's ``EncoderASR``, ``EncoderDecoderASR`` or
        ``WhisperASR`` with the recipe's modules, to be the folder's; None to
        generate one.
    report : ReportConfig
        What the report shows.
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
    method: str = "stablequant"
    weight_method: str | None = choice(None, "max", "mse")
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    plan: str | None = None
    backend: str = "auto"
    backend_options: dict = field(default_factory=dict)
    float_dtype: str = choice("float16", *FLOAT_DTYPES)
    output_folder: str | None = None
    seed: int = 0
    metric_attribute: str = DEFAULT_METRIC
    signal: str = "sig"
    audio: str = "wav"
    sample_rate: int = count(16000)
    require_checkpoint: bool = True
    inference: str | None = None
    report: ReportConfig = field(default_factory=ReportConfig)
    variants: tuple[dict, ...] = ()

    def variant_configs(self) -> dict[str, "CommonConfig"]:
        """This block with the changes of each variant, by name.

        Raises a ConfigError for a variant that is not a valid block, or a name
        used twice. Without variants, this block has the empty name.
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
            variant = merged(base, changes) | {"backend_options": options}
            configs[name] = self._built(variant, where)
        return configs

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "CommonConfig":
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
        >>> from speechbrain_stablequant import QuantizeConfig
        >>> QuantizeConfig.from_dict({"weight_bits": 6}).weight_bits
        6
        >>> QuantizeConfig.from_dict({"weight_bitz": 6})
        Traceback (most recent call last):
            ...
        speechbrain_stablequant.config.ConfigError: quantize.weight_bitz: \
unknown key; did you mean 'weight_bits'?
        """
        said: dict[str, None] = {}
        try:
            block = cls._with_new_keys(block, said)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for message in said:
            logger.warning("%s", message)
        config = cls._built(block, "quantize")
        config.variant_configs()
        return config

    @classmethod
    def _built(cls, block: Any, path: str) -> "CommonConfig":
        try:
            config = typed(block, cls, path)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for part in vars(config).values():
            if isinstance(part, MethodConfig):
                try:
                    part.check()
                except ValueError as error:
                    raise ConfigError(f"{path}.{part.block}.{error}") from None
        return config

    @classmethod
    def _with_new_keys(cls, block: Any, said: dict[str, None]) -> Any:
        """A copy of a block and its variants with paths as text, the keys of
        presets, and without old keys; adds what to warn of to ``said``."""
        if not isinstance(block, Mapping):
            return block
        result = {key: _plain(value) for key, value in block.items()}
        if "preset" in result:
            result = with_preset(result, result.pop("preset"))
        for part in fields(cls):
            keys = result.get(part.name)
            old_keys = getattr(part.type, "old_keys", {})
            for old in old_keys if isinstance(keys, dict) else ():
                if old in keys:
                    said[_rename(keys, part.name, old, old_keys[old])] = None
        variants = result.get("variants")
        if isinstance(variants, list | tuple):
            result["variants"] = [cls._with_new_keys(v, said) for v in variants]
        return result


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _rename(keys: dict, part: str, old: str, new: str | None) -> str:
    """Replaces an old key; returns what to warn of."""
    where, value = f"quantize.{part}.{old}", keys.pop(old)
    if new in keys:
        raise ConfigError(
            f"{where}: is the old name of {new}, which is set as well; "
            "remove it"
        )
    if new is not None:
        keys[new] = value
        return f"{where}: was renamed to {new}; the old name still works"
    message = f"{where}: was removed; leave it out"
    if value:
        raise ConfigError(message)
    return message
