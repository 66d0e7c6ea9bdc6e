"""Quantizes SpeechBrain's wav2vec 2.0 and HuBERT recognisers by WER."""

from .config import ConfigError, QuantizeConfig
from .lifecycle import StableQuant, register
from .plan import QuantizationPlan

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "QuantizationPlan",
    "QuantizeConfig",
    "StableQuant",
    "register",
]
