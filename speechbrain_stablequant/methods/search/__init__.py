"""The search of StableQuant: which units are sensitive, and where to clip them.

Independent of models and data: an :class:`Evaluate` function measures the
recognizer with some layers quantized.
"""

from .divergence import Divergence
from .journal import Journal
from .percentile import search_cutoffs
from .score import Evaluate, Score, check_float_wer
from .sensitivity import select_units

__all__ = [
    "Divergence",
    "Evaluate",
    "Journal",
    "Score",
    "check_float_wer",
    "search_cutoffs",
    "select_units",
]
