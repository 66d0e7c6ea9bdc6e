"""The steps of quantization that methods share, over a recogniser.

What a recogniser is (a Brain with its data) is said by a protocol; nothing
here knows a toolkit.
"""

from .calibration import Calibration, calibrate, calibrations
from .recogniser import BeforeBatch, Recogniser, fingerprint_modules
from .rounding import rounded_layers
from .scores import modelopt_scores
from .search_set import (
    check_earlier_run,
    keep_float_outputs,
    search_evaluate,
)
from .stage import Stage

__all__ = [
    "BeforeBatch",
    "Calibration",
    "Recogniser",
    "Stage",
    "calibrate",
    "calibrations",
    "check_earlier_run",
    "fingerprint_modules",
    "keep_float_outputs",
    "modelopt_scores",
    "rounded_layers",
    "search_evaluate",
]
