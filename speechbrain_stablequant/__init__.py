"""Post-training quantization of SpeechBrain's speech recognizers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .brain.attach import StableQuant, register
    from .brain.pretrained import QuantizedSource, quantize_pretrained
    from .config import ConfigError
    from .core.plan import QuantizationPlan
    from .methods.registry import QuantizeConfig
    from .transcribe.load import Recognizer, load

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "QuantizationPlan",
    "QuantizeConfig",
    "QuantizedSource",
    "Recognizer",
    "StableQuant",
    "load",
    "quantize_pretrained",
    "register",
]

_PLACES = {
    "ConfigError": "config",
    "QuantizationPlan": "core.plan",
    "QuantizeConfig": "methods.registry",
    "QuantizedSource": "brain.pretrained",
    "Recognizer": "transcribe.load",
    "StableQuant": "brain.attach",
    "load": "transcribe.load",
    "quantize_pretrained": "brain.pretrained",
    "register": "brain.attach",
}


def __getattr__(name: str) -> Any:
    """Lazy imports: inference needs neither the search nor transformers."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_PLACES[name]}", __name__)
    except (ImportError, OSError, RuntimeError):
        # One line if SpeechBrain failed to import torchaudio.
        import_module(".utils.versions", __name__).import_torchaudio()
        raise
    return getattr(module, name)
