"""What all methods share: one recognizer, its calibration and its search set.

Independent of any toolkit: protocols describe the recognizer and the trainer.
"""

from .calibration import Calibration, calibrate, calibrations
from .recognizer import Recognizer, Trainer, fingerprint_modules
from .search_set import check_earlier_run, keep_float_outputs, search_evaluate
from .session import Session

__all__ = [
    "Calibration",
    "Recognizer",
    "Session",
    "Trainer",
    "calibrate",
    "calibrations",
    "check_earlier_run",
    "fingerprint_modules",
    "keep_float_outputs",
    "search_evaluate",
]
