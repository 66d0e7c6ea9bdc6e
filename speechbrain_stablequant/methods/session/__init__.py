"""The steps of quantization that methods share, over a recognizer.

What a recognizer is (a Brain with its data) is said by a protocol; nothing
here knows a toolkit.
"""

from ..layerwise.rounding import rounded_layers
from .calibration import Calibration, calibrate, calibrations
from .recognizer import BeforeBatch, Recognizer, fingerprint_modules
from .search_set import check_earlier_run, keep_float_outputs, search_evaluate
from .session import Stage

__all__ = [
    "BeforeBatch",
    "Calibration",
    "Recognizer",
    "Stage",
    "calibrate",
    "calibrations",
    "check_earlier_run",
    "fingerprint_modules",
    "keep_float_outputs",
    "rounded_layers",
    "search_evaluate",
]
